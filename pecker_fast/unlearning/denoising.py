"""Training on the noise-prediction loss: what pretraining and the methods that keep a diffusion model share.

``NetworkPhase`` takes Adam's steps on one network; derived classes compute the gradient. ``DenoisingPhase`` minimises
the DDPM loss (arXiv 2006.11239) on labelled images.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_literals, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS, Parametrisation, null_label, predict, prediction_loss
from ..optim import MaskedAdam
from ..shifts import shifted
from .protocol import Phase
from .setting import Compute, Images
from .streams import Streams, derived_seed


@dataclass(frozen=True)
class NetworkOptions:
    """Options of Adam on one network."""

    max_train_steps: int = 1000
    """Steps."""
    train_batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 1e-4
    """Learning rate of Adam."""
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
    ema_decay: float | None = None
    """Decay of the averaged weights, which are evaluated and saved. None: no average."""

    def learning_rate_factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate in iteration ``iteration`` of ``iterations``."""
        if self.lr_scheduler == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * iteration / iterations))

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        """Check all options. ValueError or TypeError, naming the option, if one is out of range."""
        check_literals(self)
        for name in ("max_train_steps", "train_batch_size"):
            check_int(name, getattr(self, name), 1)
        check_number("learning_rate", self.learning_rate, open_low=True)
        check_number("adam_epsilon", self.adam_epsilon)
        if self.max_grad_norm is not None:
            check_number("max_grad_norm", self.max_grad_norm, open_low=True)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, high=1.0)


@dataclass(frozen=True)
class DenoisingOptions(NetworkOptions):
    """Options of training on labelled images; the defaults are those published for pretraining on CIFAR-10."""

    max_train_steps: int = 800_000
    learning_rate: float = 2e-4
    ema_decay: float | None = 0.9999
    condition_dropout: float = 0.1
    """Share of labels that become "no condition", if the network has that label."""
    random_flip: bool = True
    """Whether images are mirrored at random."""
    random_shift: int = 0
    """Pixels by which images are shifted at most, at random along both axes; the edges become black. 0: not at all."""

    def check(self, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS) -> None:
        super().check(num_train_timesteps)
        check_number("condition_dropout", self.condition_dropout, high=1.0)
        check_int("random_shift", self.random_shift, 0)


class Batches:
    """The images of each iteration: the next ones of a shuffled epoch.

    Parameters
    ----------
    seed : int
        Seed of the shuffling.
    images : Images
        Where they come from.
    count : int
        Images of an iteration.
    classes : sequence of int, optional
        Classes whose images are taken; all by default.
    members : Tensor, optional
        int64. Indices of the images that are taken, instead of classes.
    name : str
        Name of the epochs: another name is another order.

    Raises
    ------
    ValueError
        If a class has no images.
    """

    def __init__(
        self,
        seed: int,
        images: Images,
        count: int,
        *,
        classes: Sequence[int] | None = None,
        members: Tensor | None = None,
        name: str = "epoch",
    ) -> None:
        self.seed, self.images, self.count, self.name = seed, images, count, name
        self.members = torch.arange(len(images)) if members is None else members
        if classes is not None:
            self.members = members_of(images, classes)
        self._epoch: tuple[int, Tensor] | None = None

    def indices(self, iteration: int) -> Tensor:
        """Indices of the iteration's images in ``images``: int64 (count,), on the CPU."""
        size = len(self.members)
        places = torch.arange(iteration * self.count, (iteration + 1) * self.count)
        indices = torch.empty_like(places)
        for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
            if self._epoch is None or self._epoch[0] != epoch:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, self.name, epoch))
                self._epoch = epoch, torch.randperm(size, generator=generator)
            in_epoch = places // size == epoch
            indices[in_epoch] = self._epoch[1][places[in_epoch] % size]
        return self.members[indices]

    def take(self, iteration: int, compute: Compute) -> tuple[Tensor, Tensor]:
        """This process's images of an iteration and their labels, on the device."""
        indices = self.indices(iteration)[compute.world.share(self.count)]
        images = self.images.batch(indices).to(compute.device, non_blocking=True)
        return images, self.images.labels[indices].to(compute.device, non_blocking=True)


def members_of(images: Images, classes: Sequence[int]) -> Tensor:
    """Indices of the images of ``classes``, int64. ValueError if a class has no images."""
    missing = sorted(set(classes) - set(images.labels.tolist()))
    if missing:
        raise ValueError(f"the images have none of the classes {missing}, expected some of {sorted(classes)}")
    return torch.isin(images.labels, torch.tensor(list(classes))).nonzero().flatten()


def flip(streams: Streams, images: Tensor, count: int, rows: slice, name: str = "flip") -> Tensor:
    """Mirror each image with probability 1/2; ``images`` are the rows ``rows`` of a batch of ``count``."""
    uniform = torch.rand(count, generator=streams.generator(name), device=images.device)
    return torch.where((uniform[rows] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)


def shift(streams: Streams, images: Tensor, most: int, count: int, rows: slice, name: str = "shift") -> Tensor:
    """Shift each image by up to ``most`` pixels along both axes; ``images`` are the rows ``rows`` of a batch of
    ``count``."""
    if not most:
        return images
    generator = streams.generator(name)
    offsets = torch.randint(2 * most + 1, (2, count), generator=generator, device=images.device)
    return shifted(images, offsets[:, rows], most)


def drop_condition(
    streams: Streams, labels: Tensor, share: float, null: int | None, count: int, rows: slice, name: str = "condition"
) -> Tensor:
    """Replace a share of the labels by the null label, at random.

    Parameters
    ----------
    streams : Streams
        Random numbers of the iteration.
    labels : Tensor
        int64. The rows ``rows`` of a batch of ``count``.
    share : float
        Probability for each label.
    null : int, optional
        The null label. Without it nothing is replaced.
    count : int
        Rows of the batch.
    rows : slice
        Rows of this process.
    name : str
        Name of the stream.
    """
    if null is None or not share:
        return labels
    uniform = torch.rand(count, generator=streams.generator(name), device=labels.device)
    return torch.where(uniform[rows] < share, null, labels)


class NetworkPhase(Phase):
    """Steps of Adam on one network.

    Parameters
    ----------
    compute : Compute
        How to compute.
    network : nn.Module
        Trained in place. Parameters that do not require gradients are left as they are.
    schedule : Parametrisation
        Noise levels.
    options : NetworkOptions
        Options of Adam.
    name : str
        Name of the phase.
    packed : bool
        Whether moments of salient entries alone are kept: for phases whose steps all have the same mask.
    """

    def __init__(
        self,
        compute: Compute,
        network: nn.Module,
        schedule: Parametrisation,
        options: NetworkOptions,
        *,
        name: str,
        packed: bool = False,
    ) -> None:
        compute.world.check_shares("train_batch_size", options.train_batch_size)
        self.compute, self.options, self.name, self.packed = compute, options, name, packed
        self.network = compute.place(network)
        self.schedule = schedule.to(compute.device)
        self.iterations = options.max_train_steps
        self.images_per_iteration = options.train_batch_size
        self.null = null_label(network)
        self._make_optimizer()

    def _make_optimizer(self) -> None:
        o = self.options
        self.optimizer = MaskedAdam(
            [(name, param) for name, param in self.network.named_parameters() if param.requires_grad],
            lr=o.learning_rate,
            betas=(o.adam_beta1, o.adam_beta2),
            eps=o.adam_epsilon,
            ema_decay=o.ema_decay,
            packed=self.packed,
            nonfinite=self.compute.nonfinite,
        )

    @abstractmethod
    def backward(self, streams: Streams, iteration: int) -> dict[str, Tensor]:
        """Add this process's gradient to the network's: the mean over its share of the batch. Returns the losses."""

    def update(self) -> None:
        """Clip the gradient, which is the same on all processes, and take the step."""
        self.clip()
        self.optimizer.step()

    def clip(self) -> None:
        """Clip the gradient's norm."""
        if self.options.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.options.max_grad_norm)

    # ---- the protocol

    def start(self, previous: Phase | None) -> None:
        self._make_optimizer()

    def step(self, iteration: int) -> dict[str, Tensor]:
        compute = self.compute
        factor = self.options.learning_rate_factor(iteration, self.iterations)
        self.optimizer.param_groups[0]["lr"] = self.options.learning_rate * factor
        losses = self.backward(Streams(compute.device, compute.seed, self.name, iteration), iteration)
        if compute.world.size > 1:
            with compute.regions("communication"):
                compute.world.average_([p.grad for p in self.network.parameters() if p.grad is not None])
        with compute.regions("optimizer"):
            self.update()
            self.optimizer.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in losses.items()}

    def describe(self) -> dict[str, Any]:
        record = {"learning_rate": float(self.optimizer.param_groups[0]["lr"])}
        if self.compute.nonfinite != "propagate":
            record["nonfinite"] = self.optimizer.nonfinite_count
        return record

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
        return (param for param in self.network.parameters() if param.requires_grad)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        self.network.eval()
        if self.options.ema_decay is None:
            yield self.network
            return
        with self.optimizer.swapped_ema():
            yield self.network


class DenoisingPhase(NetworkPhase):
    """Steps on E ||y - y_theta(x_t, t, c)||^2 (of the noise, eps), t uniform in [0, T), on labelled images.

    Parameters
    ----------
    compute, network, schedule, options, name
        As of ``NetworkPhase``.
    images : Images
        Training images.
    classes : sequence of int, optional
        Classes of the images that are trained on; all by default.
    """

    def __init__(
        self,
        compute: Compute,
        network: nn.Module,
        schedule: Parametrisation,
        images: Images,
        options: DenoisingOptions,
        *,
        name: str,
        classes: Sequence[int] | None = None,
    ) -> None:
        options.check(schedule.num_train_timesteps)
        super().__init__(compute, network, schedule, options, name=name)
        self.batches = Batches(compute.seed, images, options.train_batch_size, classes=classes)

    def backward(self, streams: Streams, iteration: int) -> dict[str, Tensor]:
        o, compute, count = self.options, self.compute, self.options.train_batch_size
        rows = compute.world.share(count)
        with compute.regions("data"):
            x0, labels = self.batches.take(iteration, compute)
        with compute.regions("forward and backward"):
            if o.random_flip:
                x0 = flip(streams, x0, count, rows)
            x0 = shift(streams, x0, o.random_shift, count, rows)
            labels = drop_condition(streams, labels, o.condition_dropout, self.null, count, rows)
            eps = streams.normal("eps", count, x0.shape[1:])[rows]
            t = streams.timesteps("t", count, 0, self.schedule.num_train_timesteps - 1)[rows]
            self.network.train()
            streams.seed_dropout("dropout", compute.world.rank)
            with compute.autocast():
                prediction = predict(self.network, self.schedule, self.schedule.add_noise(x0, eps, t), t, labels)
            loss = prediction_loss(self.schedule.target(x0, eps, t), prediction)
            loss.backward()
        return {"loss": loss}
