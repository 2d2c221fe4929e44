"""Score forgetting distillation: what SFD and PECKER share. METHOD names: teacher phi, score network psi, generator
theta.

An iteration (SFD, arXiv 2409.11219; PECKER, arXiv 2604.05634, Eq. 3-10):

1. psi learns the score of what theta draws, for retained and for forgotten classes (Eq. 3).
2. theta takes a step on L_distill for retained classes and L_forget for forgotten ones (Eq. 4-7): there the teacher is
   asked about the cover class. PECKER lets the gradient of L_forget reach salient entries only (Eq. 8-10).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion import (
    OneStepGenerator,
    Sampler,
    TextConditioned,
    noise_prediction_loss,
    regression_loss,
    score_distillation_loss,
)
from ..mask import SaliencyMask
from ..models import save_one_step_pipeline
from ..optim import MaskedAdam
from ..sharding import local, part_of
from .gradients import add_gradients
from .graphs import GradientCalls
from .guidance import Batch, Guidance, Part
from .masking import Masker
from .options import ScoreForgettingOptions
from .protocol import Method, Phase
from .setting import Setting
from .sharded import load_network_state, load_optimizer_state, network_state, optimizer_state, whole_copy
from .streams import Streams


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """No gradients of the network's weights are computed within, only those of its input."""
    trained = _trained(network)
    for param in trained:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in trained:
            param.requires_grad_(True)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [param for param in network.parameters() if param.requires_grad]


class DistillationPhase(Phase):
    """Iterations of score forgetting distillation on networks that belong to the method.

    Parameters
    ----------
    setting, options: of the method.
    score, generator: psi and theta, trained in place.
    name: of the phase.
    iterations: steps of each network.
    score_learning_rate: of psi.
    forget: without it there are no forget batches and all classes are retained (the first stage of two).
    masker: finds the salient entries; None where the forget gradient reaches all.
    update: "joint" (one step with both gradients) or "alternate" (a masked step on the forget gradient, then a step on
        the retain gradient at the weights that it made).
    mask_scope: "forget" (the mask confines the forget gradient) or "all" (the whole step).
    """

    def __init__(
        self,
        setting: Setting,
        options: ScoreForgettingOptions,
        score: nn.Module,
        generator: nn.Module,
        *,
        name: str,
        iterations: int,
        score_learning_rate: float,
        forget: bool = True,
        masker: Masker | None = None,
        update: Literal["joint", "alternate"] = "joint",
        mask_scope: Literal["forget", "all"] = "forget",
    ) -> None:
        self.setting, self.options = setting, options
        self.score, self.generator = score, generator
        self.name, self.iterations = name, iterations
        self.score_learning_rate = score_learning_rate
        self.forget, self.masker, self.update, self.mask_scope = forget, masker, update, mask_scope
        self.images_per_iteration = options.train_batch_size * options.gradient_accumulation_steps
        self.one_step = OneStepGenerator(setting.schedule, options.t_init)
        self.conditions = setting.request.conditions(setting.device)
        self.guidance = Guidance(setting, options, self.conditions)
        several = options.gradient_accumulation_steps > 1
        self._calls = GradientCalls(setting.regions, options.cuda_graphs, setting.device, copy=several)
        self._make_optimizers()

    def _make_optimizers(self) -> None:
        o = self.options
        common = {
            "betas": (o.adam_beta1, o.adam_beta2),
            "eps": o.adam_epsilon,
            "clip_value": o.max_grad_value,
            **self.setting.optimizer_options(),
        }
        trained = [(name, param) for name, param in self.score.named_parameters() if param.requires_grad]
        self.score_optimizer = MaskedAdam(trained, lr=self.score_learning_rate, **common)
        self.generator_optimizer = MaskedAdam(
            self.generator.named_parameters(),
            lr=o.generator_learning_rate,
            ema_decay=o.ema_decay,
            variance=o.variance,
            max_update=o.max_update,
            # Packed state is of a process's own entries: no other number of processes could go on with it.
            packed=self._has_one_mask() and not self.setting.fsdp,
            **common,
        )

    def _has_one_mask(self) -> bool:
        """Whether all of theta's steps are confined to one mask: then nothing else needs moments."""
        return self.masker is not None and self.mask_scope == "all" and self.masker.options.mask_refresh_steps == 0

    # ---- the protocol

    def start(self, previous: Phase | None) -> None:
        if previous is not None:
            # The averaged weights are what the phase before it was for.
            with previous.averaged() as network, torch.no_grad():
                averaged = [p.detach().clone() for p in network.parameters()]
            with torch.no_grad():
                for param, value in zip(self.generator.parameters(), averaged, strict=True):
                    local(param).copy_(part_of(value, param))
        self._make_optimizers()
        if self.masker is not None:
            self.masker.start(self.generator)

    def step(self, iteration: int) -> dict[str, Tensor]:
        o, regions = self.options, self.setting.regions
        factor = o.learning_rate_factor(iteration, self.iterations)
        self.score_optimizer.param_groups[0]["lr"] = self.score_learning_rate * factor
        self.generator_optimizer.param_groups[0]["lr"] = o.generator_learning_rate * factor
        place = (self.setting.seed, self.name, iteration)
        micros = []
        for micro in range(o.gradient_accumulation_steps):
            streams = Streams(self.setting.device, *place, micro)
            micros.append((streams, self._draw(streams)))
        losses: dict[str, Tensor] = {}
        for streams, batch in micros:
            self._score_backward(streams, batch, losses)
        self._average(self.score)
        with regions("optimizer"):
            self.score_optimizer.step()
            self.score_optimizer.zero_grad(set_to_none=True)
        if self.masker is not None:
            self.masker.refresh(iteration, self.generator)
        if self.update == "alternate":
            self._alternate_update(micros, losses)
        else:
            self._joint_update(micros, losses)
        return losses

    def describe(self) -> dict[str, Any]:
        said = {
            "score_learning_rate": float(self.score_optimizer.param_groups[0]["lr"]),
            "generator_learning_rate": float(self.generator_optimizer.param_groups[0]["lr"]),
        }
        if self.setting.nonfinite != "propagate":
            said["nonfinite"] = self.score_optimizer.nonfinite_count + self.generator_optimizer.nonfinite_count
        return said | ({} if self.masker is None else self.masker.describe())

    def state_dict(self) -> dict[str, Any]:
        world = self.setting.world
        return {
            "score": network_state(self.score, world),
            "generator": network_state(self.generator, world),
            "score_optimizer": optimizer_state(self.score_optimizer, world),
            "generator_optimizer": optimizer_state(self.generator_optimizer, world),
            "masker": None if self.masker is None else self.masker.state_dict(self.generator),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_network_state(self.score, state["score"])
        load_network_state(self.generator, state["generator"])
        self._make_optimizers()
        load_optimizer_state(self.score_optimizer, state["score_optimizer"])
        load_optimizer_state(self.generator_optimizer, state["generator_optimizer"])
        if self.masker is not None:
            self.masker.load_state_dict(state["masker"], self.generator)

    def last_mask(self) -> SaliencyMask | None:
        return None if self.masker is None else self.masker.whole_mask(self.generator)

    def trained_parameters(self) -> Iterable[Tensor]:
        yield from _trained(self.score)
        yield from self.generator.parameters()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        self.generator.eval()
        averages = nullcontext() if self.options.ema_decay is None else self.generator_optimizer.swapped_ema()
        if not self.setting.fsdp:
            with averages:
                yield self.generator
            return
        with averages:
            network = whole_copy(self.generator, self.setting.teacher)
        yield network.eval()

    # ---- an iteration

    def _draw(self, streams: Streams) -> Batch:
        """The labels of an iteration; the score step and the generator step share them."""
        o = self.options
        world, count = self.setting.world, o.train_batch_size
        kept = world.share(count)
        retained = self.conditions.draw_retained(streams, count, everything=not self.forget)[kept]
        if not self.forget:
            return Batch(retained, retained, len(retained), kept, count)
        kept_too = world.share(o.forget_samples)
        forgotten, covers = (labels[kept_too] for labels in self.conditions.draw_forgotten(streams, o.forget_samples))
        total = count + o.forget_samples
        rows: slice | Tensor = slice(None)
        if world.size > 1:
            every = torch.arange(total, device=self.setting.device)
            rows = torch.cat([every[kept], every[world.share(o.forget_samples, count)]])
        return Batch(torch.cat([retained, forgotten]), torch.cat([retained, covers]), len(retained), rows, total)

    def _noise(self, streams: Streams, batch: Batch, purpose: str, name: str) -> Tensor:
        """Standard normal numbers for this process's samples, one image each."""
        return streams.normal(f"{purpose} {name}", batch.total, self.setting.sample_shape)[batch.rows]

    def _timesteps(self, streams: Streams, batch: Batch, purpose: str) -> Tensor:
        o = self.options
        return streams.timesteps(f"{purpose} t", batch.total, o.t_min, o.t_max)[batch.rows]

    def _pieces(self, batch: Batch, part: Part = "both") -> list[Part]:
        """What of a batch goes through the networks in one call."""
        if part == "both" and self.options.split_batches and batch.retained < len(batch.labels):
            return ["retain", "forget"]
        return [part]

    def _score_backward(self, streams: Streams, batch: Batch, losses: dict[str, Tensor]) -> None:
        """Adds the gradient of L_psi (Eq. 3), times 1 / micro-batches, to psi's."""
        z = self._noise(streams, batch, "score", "z")
        eps = self._noise(streams, batch, "score", "eps")
        t = self._timesteps(streams, batch, "score")
        drawn = [z, eps, t, batch.labels, batch.teacher_labels, *self.guidance.drawn(streams, batch)]
        for piece in self._pieces(batch):
            part, kept = batch.part(piece)
            name = "score dropout" if piece == "both" else f"score dropout {piece}"
            seed = streams.dropout_seed(name, self.setting.world.rank)
            tensors = [tensor[kept] for tensor in drawn]
            found, _ = self._calls("score step", self._score_gradient, self.score, seed, tensors, part.retained)
            self._record(losses, found)

    def _score_gradient(
        self,
        z: Tensor,
        eps: Tensor,
        t: Tensor,
        labels: Tensor,
        teacher_labels: Tensor,
        *further: Any,
        earlier: list[Tensor | None] | None = None,
    ) -> tuple[dict[str, Tensor], None]:
        """The losses. ``further``: what guidance draws, and how many of the samples are of retained classes."""
        *dropped, r = further
        o, setting, found, batch = self.options, self.setting, {}, Batch.of(labels, teacher_labels, r)
        with setting.regions("sampling"), torch.no_grad(), setting.autocast():
            self.generator.eval()
            x0 = self.one_step(self.generator, z, labels)
        with setting.regions("score step"):
            x_t = setting.schedule.add_noise(x0, eps, t)
            self.score.train()
            with setting.autocast():
                eps_pred = self.guidance.learning(self.score, x_t, t, batch, *dropped)
            total: Tensor | float = 0.0
            if r > 0:
                found["loss_score_retain"] = noise_prediction_loss(eps[:r], eps_pred[:r])
                total = total + o.score_retain_weight * found["loss_score_retain"]
            if r < len(labels):
                found["loss_score_forget"] = noise_prediction_loss(eps[r:], eps_pred[r:])
                total = total + o.score_forget_weight * found["loss_score_forget"]
            (total / o.gradient_accumulation_steps).backward()
        return {name: loss.detach() for name, loss in found.items()}, None

    def _average(self, network: nn.Module, further: list[Tensor] | None = None) -> None:
        """Averages the network's gradients over the processes, and ``further`` ones, where FSDP has not done it."""
        if self.setting.world.size > 1 and not self.setting.fsdp:
            with self.setting.regions("communication"):
                grads = [p.grad for p in network.parameters() if p.grad is not None]
                self.setting.world.average_([*grads, *(further or ())])

    def _record(self, losses: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        for name, loss in found.items():
            share = loss / self.options.gradient_accumulation_steps
            losses[name] = losses[name] + share if name in losses else share

    def _joint_update(self, micros: list[tuple[Streams, Batch]], losses: dict[str, Tensor]) -> None:
        separate = self.masker is not None and self.mask_scope == "forget"
        forget_grads: list[Tensor | None] | None = None
        for streams, batch in micros:
            forget_grads = self._generator_backward(streams, batch, losses, separate, forget_grads)
        mask = None if self.masker is None else self.masker.mask
        self._average(self.generator, [grad for grad in forget_grads or () if grad is not None])
        with self.setting.regions("optimizer"):
            if separate:
                self.generator_optimizer.step(mask=mask, masked_grads=forget_grads)
            else:
                self.generator_optimizer.step(mask=mask)
            self.generator_optimizer.zero_grad(set_to_none=True)

    def _alternate_update(self, micros: list[tuple[Streams, Batch]], losses: dict[str, Tensor]) -> None:
        for part in ("forget", "retain"):
            for streams, batch in micros:
                self._generator_backward(streams, batch, losses, False, part=part)
            self._average(self.generator)
            masked = self.masker is not None and (part == "forget" or self.mask_scope == "all")
            with self.setting.regions("optimizer"):
                self.generator_optimizer.step(mask=self.masker.mask if masked else None)
                self.generator_optimizer.zero_grad(set_to_none=True)

    def _generator_backward(
        self,
        streams: Streams,
        batch: Batch,
        losses: dict[str, Tensor],
        separate: bool,
        forget_grads: list[Tensor | None] | None = None,
        part: Part = "both",
    ) -> list[Tensor | None] | None:
        """Adds the gradient of L_theta (Eq. 4-7) to theta's.

        With ``separate`` that is L_distill's alone, and the gradient of L_forget, one tensor a parameter and None where
        the mask is known to be empty, is added to ``forget_grads`` and returned: the two meet in the optimizer.
        """
        z = self._noise(streams, batch, "generator", "z")
        eps = self._noise(streams, batch, "generator", "eps")
        t = self._timesteps(streams, batch, "generator")
        for piece in self._pieces(batch, part):
            there, kept = batch.part(piece)
            seed = streams.dropout_seed(f"generator dropout {piece}", self.setting.world.rank)
            tensors = [z[kept], eps[kept], t[kept], there.labels, there.teacher_labels]
            static = (there.retained, separate and piece != "retain")
            found, forget_grads = self._calls(
                "generator step", self._generator_gradient, self.generator, seed, tensors, *static, earlier=forget_grads
            )
            self._record(losses, found)
        return forget_grads

    def _generator_gradient(
        self,
        z: Tensor,
        eps: Tensor,
        t: Tensor,
        labels: Tensor,
        teacher_labels: Tensor,
        r: int,
        separate: bool,
        earlier: list[Tensor | None] | None = None,
    ) -> tuple[dict[str, Tensor], list[Tensor | None] | None]:
        """The losses, and ``earlier`` gradients of L_forget with ``separate`` ones added; the first ``r`` samples are
        of retained classes."""
        o, setting, batch = self.options, self.setting, Batch.of(labels, teacher_labels, r)
        with setting.regions("generator forward"), setting.autocast():
            self.generator.train()
            # Two calls where two gradients of the weights are wanted: one backward pass for each batch, not for both.
            pieces = [slice(r), slice(r, None)] if separate and r > 0 else [slice(None)]
            drawn = [self.one_step(self.generator, z[piece], labels[piece]) for piece in pieces]
        leaf = torch.cat([x.detach() for x in drawn]).requires_grad_()
        # Frozen until the backward pass is over, which computes activations again where gradients are checkpointed.
        with setting.regions("teacher and score network"), _frozen(self.score):
            loss, found = self._generator_loss(leaf, z, eps, t, batch)
            (grad,) = torch.autograd.grad(loss / o.gradient_accumulation_steps, leaf)
        with setting.regions("generator backward"):
            if separate:
                earlier = add_gradients(drawn.pop(), list(self.generator.parameters()), earlier, grad[pieces.pop()])
            for x, piece in zip(drawn, pieces, strict=True):
                x.backward(grad[piece])
        return {name: value.detach() for name, value in found.items()}, earlier

    def _generator_loss(
        self, x: Tensor, z: Tensor, eps: Tensor, t: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_theta as a function of the images ``x`` of ``batch``, and its terms."""
        o, setting, schedule, r, found = self.options, self.setting, self.setting.schedule, batch.retained, {}
        self.score.eval()
        x_t = schedule.add_noise(x, eps, t)
        with setting.autocast():
            x0_teacher = schedule.predict_x0(x_t, self.guidance.teacher(x_t, t, batch), t)
            x0_score = schedule.predict_x0(x_t, self.guidance.score(self.score, x_t, t, batch), t)
        total: Tensor | float = 0.0
        if r > 0:
            found["loss_distill"] = score_distillation_loss(x[:r], x0_teacher[:r], x0_score[:r], o.alpha)
            total = total + o.generator_retain_weight * found["loss_distill"]
        if r < len(x):
            found["loss_forget"] = score_distillation_loss(x[r:], x0_teacher[r:], x0_score[r:], o.alpha)
            total = total + o.generator_forget_weight * found["loss_forget"]
            if o.regression_weight:
                self.generator.eval()
                with torch.no_grad(), setting.autocast():
                    cover = self.one_step(self.generator, z[r:], batch.teacher_labels[r:])
                # As it drew ``x``, which it may have to do again.
                self.generator.train()
                found["loss_regression"] = regression_loss(x[r:], cover)
                total = total + o.regression_weight * found["loss_regression"]
        return total, found


class ScoreForgetting(Method):
    """Base of the methods that distil the teacher into a one-step generator while it forgets."""

    Options = ScoreForgettingOptions
    forgets_prompts = True

    def __init__(self, setting: Setting, options: ScoreForgettingOptions) -> None:
        super().__init__(setting, options)
        options.check(setting.schedule.num_train_timesteps)
        setting.world.check_shares("train_batch_size", options.train_batch_size)
        setting.world.check_shares("forget_batch_size", options.forget_samples)
        # Both start as the teacher (the pretrained average) where nothing else is given.
        self.score = setting.trainable_score(setting.initial_score or setting.teacher)
        self.generator = setting.trainable(setting.initial_generator or setting.teacher)
        setting.lower_teacher()
        self.one_step = OneStepGenerator(setting.schedule, options.t_init)

    @classmethod
    def check_sharding(
        cls, options: ScoreForgettingOptions, processes: int, torch_compile: bool, score_lora_rank: int
    ) -> None:
        if processes == 1:
            raise ValueError("fsdp is set, but the run has one process: start several with torchrun")
        others = {"torch_compile": torch_compile, "score_lora_rank": score_lora_rank}
        for name, value in {**others, "cuda_graphs": options.cuda_graphs}.items():
            if value:
                raise ValueError(f"fsdp is set, and so is {name}: expected one of them")

    @property
    def sampler(self) -> Sampler:
        return Sampler("one_step", t_init=self.options.t_init)

    def save(self, folder: Path, network: nn.Module) -> None:
        """As a pipeline that draws in one step; of a text-conditional network the U-Net alone."""
        if isinstance(network, TextConditioned):
            super().save(folder, network)
            return
        save_one_step_pipeline(folder, network, self.setting.schedule, self.options.t_init)
