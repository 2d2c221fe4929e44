"""Pretraining of the class-conditional teacher: denoising diffusion (DDPM, arXiv 2006.11239) on labelled images."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion import NoiseSchedule, noise_prediction_loss, null_label, predict_eps
from ..diffusion.checks import check_int
from ..optim import MaskedAdam
from ..unlearning import Compute, Phase
from ..unlearning.options import check_number
from ..unlearning.streams import Streams, derived_seed


@dataclass(frozen=True)
class PretrainOptions:
    """Options of pretraining; the defaults are those published for CIFAR-10."""

    max_train_steps: int = 800_000
    """Steps."""
    train_batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 2e-4
    """Of Adam."""
    lr_scheduler: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: constant, or falling to 0 along a cosine."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to Adam's denominator."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this norm."""
    ema_decay: float | None = 0.9999
    """Of the averaged weights, which are saved. None: no average."""
    condition_dropout: float = 0.1
    """Share of labels that become "no condition", where the network has that label."""
    random_flip: bool = True
    """Whether images are mirrored at random."""

    def check(self) -> None:
        """Raises ValueError or TypeError, naming the option, where one is out of range."""
        for name in ("max_train_steps", "train_batch_size"):
            check_int(name, getattr(self, name), 1)
        check_number("learning_rate", self.learning_rate, open_low=True)
        check_number("adam_epsilon", self.adam_epsilon)
        check_number("condition_dropout", self.condition_dropout, high=1.0)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, open_low=True)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, high=1.0)
        if self.lr_scheduler not in ("constant", "cosine"):
            raise ValueError(f'lr_scheduler is {self.lr_scheduler!r}, expected "constant" or "cosine"')


class Pretraining(Phase):
    """Steps on E ||eps - eps_theta(x_t, t, c)||^2, t uniform in [0, T).

    Parameters
    ----------
    compute: where and how.
    network: trained in place.
    schedule: noise levels.
    dataset: LabelledImages (``batch(indices)`` float32 (B, C, H, W) in [-1, 1], ``labels`` int64 (N,), ``len``).
    """

    name = "pretrain"

    def __init__(self, compute: Compute, network: nn.Module, schedule: NoiseSchedule, dataset, options) -> None:
        options.check()
        compute.world.check_shares("train_batch_size", options.train_batch_size)
        self.compute, self.options, self.dataset = compute, options, dataset
        self.network = compute.place(network)
        self.schedule = schedule.to(compute.device)
        self.iterations = options.max_train_steps
        self.images_per_iteration = options.train_batch_size
        self._null = null_label(network)
        self._epoch: tuple[int, Tensor] | None = None
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        o = self.options
        self.optimizer = MaskedAdam(
            self.network.named_parameters(),
            lr=o.learning_rate,
            betas=(o.adam_beta1, o.adam_beta2),
            eps=o.adam_epsilon,
            ema_decay=o.ema_decay,
            nonfinite=self.compute.nonfinite,
        )

    def start(self, previous: Phase | None) -> None:
        self._make_optimizer()

    def _indices(self, iteration: int) -> Tensor:
        """The images of an iteration: those next in line in a shuffled epoch."""
        size, count = len(self.dataset), self.options.train_batch_size
        places = torch.arange(iteration * count, (iteration + 1) * count)
        indices = torch.empty_like(places)
        for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
            if self._epoch is None or self._epoch[0] != epoch:
                generator = torch.Generator().manual_seed(derived_seed(self.compute.seed, "epoch", epoch))
                self._epoch = epoch, torch.randperm(size, generator=generator)
            here = places // size == epoch
            indices[here] = self._epoch[1][places[here] % size]
        return indices

    def step(self, iteration: int) -> dict[str, Tensor]:
        o, compute = self.options, self.compute
        streams = Streams(compute.device, compute.seed, self.name, iteration)
        if o.lr_scheduler == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))
            self.optimizer.param_groups[0]["lr"] = o.learning_rate * factor
        count = o.train_batch_size
        here = compute.world.share(count)
        with compute.regions("data"):
            indices = self._indices(iteration)[here]
            x0 = self.dataset.batch(indices).to(compute.device, non_blocking=True)
            labels = self.dataset.labels[indices].to(compute.device, non_blocking=True)
        with compute.regions("forward and backward"):
            if o.random_flip:
                draw = torch.rand(count, generator=streams.generator("flip"), device=compute.device)
                flipped = draw[here] < 0.5
                x0 = torch.where(flipped.view(-1, 1, 1, 1), x0.flip(-1), x0)
            if self._null is not None and o.condition_dropout:
                draw = torch.rand(count, generator=streams.generator("condition"), device=compute.device)
                labels = torch.where(draw[here] < o.condition_dropout, self._null, labels)
            eps = streams.normal("eps", count, x0.shape[1:])[here]
            t = streams.timesteps("t", count, 0, self.schedule.num_train_timesteps - 1)[here]
            self.network.train()
            streams.seed_dropout("dropout", compute.world.rank)
            with compute.autocast():
                eps_pred = predict_eps(self.network, self.schedule.add_noise(x0, eps, t), t, labels)
            loss = noise_prediction_loss(eps, eps_pred)
            loss.backward()
        if compute.world.size > 1:
            with compute.regions("communication"):
                compute.world.average_([p.grad for p in self.network.parameters() if p.grad is not None])
        with compute.regions("optimizer"):
            if o.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), o.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach()}

    def describe(self) -> dict[str, Any]:
        return {"learning_rate": float(self.optimizer.param_groups[0]["lr"])}

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            self.network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise ValueError(f"the state is of another network: {error}") from error
        self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])

    def trained_parameters(self) -> Iterable[Tensor]:
        return self.network.parameters()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        self.network.eval()
        if self.options.ema_decay is None:
            yield self.network
            return
        with self.optimizer.swapped_ema():
            yield self.network
