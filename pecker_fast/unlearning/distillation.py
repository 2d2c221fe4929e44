"""Score forgetting distillation: what SFD and PECKER share. Notation: teacher phi, score network psi, generator theta.

An iteration (SFD, arXiv 2409.11219; PECKER, arXiv 2604.05634, Eq. 3-10):

1. psi learns the score of theta's samples, of retained and of forgotten classes (Eq. 3).
2. theta takes a step on L_distill for retained classes and on L_forget for forgotten ones (Eq. 4-7), for which the
   teacher is given the cover class. PECKER lets the gradient of L_forget reach salient entries only (Eq. 8-10).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..diffusion import OneStepGenerator
from ..mask import SaliencyMask
from ..optim import MaskedAdam, PackedGradients, pack_gradients
from ..sharding import local, part_of
from .destroy import Destroyer
from .distillation_losses import DistillationLosses, trainable
from .gradients import dropped_gradients
from .graphs import GradientCalls
from .guidance import Batch, Guidance, Part
from .masking import BaseMasker
from .options import ScoreForgettingOptions
from .protocol import MemoryPlan, Phase, TrainedNetwork
from .relabel import relabelling
from .setting import Setting
from .sharded import load_network_state, load_optimizer_state, network_state, optimizer_state, whole_copy
from .shared_weights import SharedWeights
from .streams import Streams

# Parts of an iteration in an estimate of memory.
SCORE_SALIENCY, SALIENCY = "score network's saliency gradient", "saliency gradient"


class DistillationPhase(Phase):
    """Iterations of score forgetting distillation on networks that belong to the method.

    Parameters
    ----------
    setting : Setting
        Of the method.
    options : ScoreForgettingOptions
        Of the method.
    score, generator : nn.Module
        psi and theta, trained in place.
    name : str
        Name of the phase.
    iterations : int
        Steps of each network.
    score_learning_rate : float
        Learning rate of psi.
    forget : bool
        Whether there are forgotten samples. Otherwise all classes are retained, as in the first stage of two.
    generator_learning_rate : float, optional
        Learning rate of theta; that of the options by default.
    masker : BaseMasker, optional
        Finds the salient entries. Without it the forget gradient reaches all entries.
    update : {"joint", "alternate"}
        One step with both gradients; or a masked step on the forget gradient, then a step on the retain gradient at the
        weights that the first one left.
    mask_scope : {"forget", "all"}
        Whether the mask confines the forget gradient or the whole step.
    score_masker : BaseMasker, optional
        Finds the entries of psi that its steps are confined to, in one mask for the whole phase. Without it they reach
        all entries.
    packs_gradients : bool
        Whether gradients of a network whose steps one mask confines are packed.
    shared : SharedWeights, optional
        The weights that psi, theta or both share with the teacher.
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
        generator_learning_rate: float | None = None,
        masker: BaseMasker | None = None,
        update: Literal["joint", "alternate"] = "joint",
        mask_scope: Literal["forget", "all"] = "forget",
        score_masker: BaseMasker | None = None,
        packs_gradients: bool = True,
        shared: SharedWeights | None = None,
    ) -> None:
        self.setting, self.options = setting, options
        self.score, self.generator, self.shared = score, generator, shared
        self.name, self.iterations = name, iterations
        self.score_learning_rate = score_learning_rate
        self.generator_learning_rate = generator_learning_rate or options.generator_learning_rate
        self.score_masker = score_masker
        # A CUDA graph leaves gradients in memory of its own.
        self._packs_gradients = packs_gradients and not options.cuda_graphs
        self.forget, self.masker, self.update, self.mask_scope = forget, masker, update, mask_scope
        self.images_per_iteration = options.train_batch_size * options.gradient_accumulation_steps
        problem, compute = setting.problem, setting.compute
        self.one_step = OneStepGenerator(problem.schedule, options.t_init)
        self.conditions = problem.request.conditions(compute.device)
        self.guidance = Guidance(setting, options, self.conditions)
        redraws = shared is not None and shared.has("generator")
        self.losses = DistillationLosses(setting, options, score, generator, self.one_step, self.guidance, redraws)
        several = options.gradient_accumulation_steps > 1
        self._calls = GradientCalls(compute.regions, options.cuda_graphs, compute.device, copy=several)
        self._packings: dict[MaskedAdam, PackedGradients] = {}
        self._destroyer: Destroyer | None = None
        if forget and options.destroy is not None:
            confines = masker if self._has_one_mask() else None
            self._destroyer = Destroyer(setting, options, generator, confines)
        self._destroyed: dict[str, float] = {}
        # Whether training has ended, so that the forgotten classes are relabelled.
        self._relabelled = False
        self._make_optimizers()

    def _make_optimizers(self) -> None:
        o = self.options
        for packing in self._packings.values():
            packing.remove()
        self._packings = {}
        common = {
            "betas": (o.adam_beta1, o.adam_beta2),
            "eps": o.adam_epsilon,
            "clip_value": o.max_grad_value,
        }
        trained = [(name, param) for name, param in self.score.named_parameters() if param.requires_grad]
        # Packed state covers a process's own entries: no other number of processes could resume from it.
        can_pack = not self.setting.placement.fsdp
        packs_score = self.score_masker is not None and can_pack
        self.score_optimizer = MaskedAdam(
            trained,
            lr=self.score_learning_rate,
            packed=packs_score,
            **common,
            **self.setting.optimizer_options("score"),
        )
        self.generator_optimizer = MaskedAdam(
            self.generator.named_parameters(),
            lr=self.generator_learning_rate,
            ema_decay=o.ema_decay,
            variance=o.variance,
            max_update=o.max_update,
            packed=self._has_one_mask() and can_pack,
            **common,
            **self.setting.optimizer_options("generator"),
        )

    def _trained(self) -> list[tuple[str, nn.Module, MaskedAdam, BaseMasker | None]]:
        """psi and theta, with what trains them."""
        return [
            ("score", self.score, self.score_optimizer, self.score_masker),
            ("generator", self.generator, self.generator_optimizer, self.masker),
        ]

    def _use_masks(self) -> None:
        """Confine networks that share weights, and pack the gradients of those that one mask confines, once there is a
        mask: no other entry needs one."""
        for name, _, optimizer, masker in self._trained():
            if masker is None or masker.mask is None:
                continue
            if self._is_shared(name):
                self.shared.confine(name, masker.mask)
            if self._packs(optimizer) and optimizer not in self._packings:
                self._packings[optimizer] = pack_gradients(optimizer, masker.mask)

    def _packs(self, optimizer: MaskedAdam) -> bool:
        """Whether an optimizer's gradients are packed once there is a mask."""
        return self._packs_gradients and optimizer.defaults["packed"]

    def _is_shared(self, name: str) -> bool:
        return self.shared is not None and self.shared.has(name)

    def _activate(self, name: str) -> None:
        """Put a network's own weights in place before code reads or writes its parameters, if it shares weights."""
        if self._is_shared(name):
            self.shared.activate(name)

    def _has_one_mask(self) -> bool:
        """Whether one mask confines all of theta's steps: then no other entry needs moments."""
        return self.masker is not None and self.mask_scope == "all" and self.masker.refresh_steps == 0

    # ---- the protocol

    def start(self, previous: Phase | None) -> None:
        if previous is not None:
            # The averaged weights are the result of the previous phase.
            with previous.averaged() as network, torch.no_grad():
                averaged = [p.detach().clone() for p in network.parameters()]
            with torch.no_grad():
                for param, value in zip(self.generator.parameters(), averaged, strict=True):
                    local(param).copy_(part_of(value, param))
        self._make_optimizers()
        for masker in filter(None, (self.masker, self.score_masker, self._destroyer)):
            masker.start(self.generator)
        if self._destroyer is not None:
            self._destroy()
            # Averages and masters start from what is left.
            self._make_optimizers()

    def _destroy(self) -> None:
        """Destroy entries of theta. What chooses them, and the entries of masks that stay, needs theta as it was."""
        if self._has_one_mask():
            self.masker.refresh(0, self.generator)
        if self.score_masker is not None:
            self.score_masker.refresh(0, self.score)
        self._destroyed = self._destroyer.destroy(self.generator)

    def step(self, iteration: int) -> dict[str, Tensor]:
        o = self.options
        factor = o.learning_rate_factor(iteration, self.iterations)
        self.score_optimizer.param_groups[0]["lr"] = self.score_learning_rate * factor
        self.generator_optimizer.param_groups[0]["lr"] = self.generator_learning_rate * factor
        micros = self._micro_batches(iteration)
        losses: dict[str, Tensor] = {}
        if self.score_masker is None:
            score_mask = None
        else:
            self.score_masker.refresh(iteration, self.score)
            score_mask = self.score_masker.mask
            self._use_masks()
        self._score_gradients(micros, losses)
        self._activate("score")
        self._take_step(self.score_optimizer, mask=score_mask)
        if self.masker is not None:
            self.masker.refresh(iteration, self.generator)
            self._use_masks()
        for arguments in self._generator_gradients(micros, losses):
            self._activate("generator")
            self._take_step(self.generator_optimizer, **arguments)
        self._relabelled = o.relabel and self.forget and iteration + 1 == self.iterations
        return losses

    def describe(self) -> dict[str, Any]:
        record = {
            "score_learning_rate": float(self.score_optimizer.param_groups[0]["lr"]),
            "generator_learning_rate": float(self.generator_optimizer.param_groups[0]["lr"]),
        }
        if self.setting.compute.nonfinite != "propagate":
            record["nonfinite"] = self.score_optimizer.nonfinite_count + self.generator_optimizer.nonfinite_count
        if self.score_masker is not None:
            record["score_mask_density"] = self.score_masker.describe().get("mask_density")
        record |= self._destroyed
        return record | ({} if self.masker is None else self.masker.describe())

    def state_dict(self) -> dict[str, Any]:
        world = self.setting.compute.world
        further = {} if self.score_masker is None else {"score_masker": self.score_masker.state_dict(self.score)}
        if self._destroyed:
            further["destroyed"] = self._destroyed
        if self._relabelled:
            further["relabelled"] = True
        return {
            **further,
            **{
                name: self.shared.state(name) if self._is_shared(name) else network_state(network, world)
                for name, network, _, _ in self._trained()
            },
            "score_optimizer": optimizer_state(self.score_optimizer, world),
            "generator_optimizer": optimizer_state(self.generator_optimizer, world),
            "masker": None if self.masker is None else self.masker.state_dict(self.generator),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, network, _, _ in self._trained():
            if not self._is_shared(name):
                load_network_state(network, state[name])
        self._destroyed = state.get("destroyed", {})
        self._relabelled = state.get("relabelled", False)
        self._make_optimizers()
        if self.masker is not None:
            self.masker.load_state_dict(state["masker"], self.generator)
        if self.score_masker is not None:
            self.score_masker.load_state_dict(state["score_masker"], self.score)
        for name, _, optimizer, masker in self._trained():
            if self._is_shared(name):
                self.shared.load(name, state[name], masker.mask)
            self._activate(name)
            load_optimizer_state(optimizer, state[f"{name}_optimizer"])
        self._use_masks()

    def gradient_bytes(self) -> int:
        """Bytes of theta's gradients in an iteration, whose mask must be there if it has one."""
        packing = self._packings.get(self.generator_optimizer)
        params = trainable(self.generator)
        return sum(param.nbytes for param in params) if packing is None else packing.nbytes

    def last_mask(self) -> SaliencyMask | None:
        return None if self.masker is None else self.masker.whole_mask(self.generator)

    def trained_parameters(self) -> Iterable[Tensor]:
        yield from trainable(self.score)
        yield from self.generator.parameters()
        if self.shared is not None:
            # In the parameters are those of one network.
            yield from self.shared.stored()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        self.generator.eval()
        averages = nullcontext() if self.options.ema_decay is None else self.generator_optimizer.swapped_ema()
        if not self.setting.placement.fsdp:
            self._activate("generator")
            with averages, self._relabelling():
                try:
                    yield self.generator
                finally:
                    # Another network may have been called meanwhile.
                    self._activate("generator")
            return
        with averages:
            network = whole_copy(self.generator, self.setting.problem.teacher)
        yield network.eval()

    def _relabelling(self) -> AbstractContextManager[None]:
        if not self._relabelled:
            return nullcontext()
        return relabelling(self.generator, self.setting.problem.request, self.setting.compute.seed)

    # ---- memory

    def memory_plan(self) -> MemoryPlan:
        """What an estimate of memory needs to know of this phase."""
        networks = []
        for name, network, optimizer, masker in self._trained():
            trained = TrainedNetwork(network, optimizer, packed=self._packs(optimizer) + self._is_shared(name))
            if masker is not None:
                step = self.update if name == "generator" and self.mask_scope == "forget" else "masked"
                trained = replace(trained, step=step, density=masker.density or 1.0, masks=masker.MASKS)
            networks.append(trained)
        first = {SCORE_SALIENCY: 0} if self.score_masker is not None else {}
        if self._has_one_mask():
            first[SALIENCY] = 1
        return MemoryPlan(networks, self._rehearse, first)

    def _rehearse(self, note: Callable[[str | None], None]) -> None:
        """The gradients of an iteration, without its steps; ``note`` as in ``MemoryPlan``."""
        losses: dict[str, Tensor] = {}
        streams = Streams(self.setting.compute.device, "rehearsal")
        if self.score_masker is not None:
            self.score_masker.rehearse(streams, self.score)
            note(SCORE_SALIENCY)
        # A gradient that is packed does not last.
        dropped = {
            name: dropped_gradients(trainable(network) if self._packs(optimizer) else ())
            for name, network, optimizer, _ in self._trained()
        }
        micros = self._micro_batches(0)
        with dropped["score"]:
            self._score_gradients(micros, losses)
        note("score network's step")
        self.score.zero_grad(set_to_none=True)
        if self.masker is not None:
            note(None)
            self.masker.rehearse(streams, self.generator)
            note(SALIENCY)
        with dropped["generator"]:
            for _ in self._generator_gradients(micros, losses):
                note("generator's step")
                self.generator.zero_grad(set_to_none=True)

    # ---- an iteration

    def _micro_batches(self, iteration: int) -> list[tuple[Streams, Batch]]:
        compute = self.setting.compute
        micros = []
        for micro in range(self.options.gradient_accumulation_steps):
            streams = Streams(compute.device, compute.seed, self.name, iteration, micro)
            micros.append((streams, self._draw(streams)))
        return micros

    def _draw(self, streams: Streams) -> Batch:
        """The labels of a micro-batch, which the score step and the generator step share."""
        o, compute = self.options, self.setting.compute
        world, count = compute.world, o.train_batch_size
        rows = world.share(count)
        retained = self.conditions.draw_retained(streams, count, everything=not self.forget)[rows]
        if not self.forget:
            return Batch(retained, retained, len(retained), rows, count)
        forget_rows = world.share(o.forget_samples)
        pairs = self.conditions.draw_forgotten(streams, o.forget_samples)
        forgotten, covers = (labels[forget_rows] for labels in pairs)
        total = count + o.forget_samples
        if world.size > 1:
            every = torch.arange(total, device=compute.device)
            rows = torch.cat([every[rows], every[world.share(o.forget_samples, count)]])
        else:
            rows = slice(None)
        return Batch(torch.cat([retained, forgotten]), torch.cat([retained, covers]), len(retained), rows, total)

    def _noise(self, streams: Streams, batch: Batch, purpose: str, name: str) -> Tensor:
        """Standard normal numbers for this process's samples, in the shape of one image each."""
        return streams.normal(f"{purpose} {name}", batch.total, self.setting.problem.sample_shape)[batch.rows]

    def _timesteps(self, streams: Streams, batch: Batch, purpose: str) -> Tensor:
        o = self.options
        return streams.timesteps(f"{purpose} t", batch.total, o.t_min, o.t_max)[batch.rows]

    def _pieces(self, batch: Batch, part: Part = "both") -> list[Part]:
        """The parts of a batch that go through the networks in one call each."""
        if part == "both" and self.options.split_batches and batch.retained < len(batch.labels):
            return ["retain", "forget"]
        return [part]

    def _take_step(self, optimizer: MaskedAdam, **arguments: Any) -> None:
        with self.setting.compute.regions("optimizer"):
            optimizer.step(**arguments)
            optimizer.zero_grad(set_to_none=True)

    def _average(self, optimizer: MaskedAdam, forget_grads: list[Tensor] | None = None) -> None:
        """Average an optimizer's gradients over the processes, and forget gradients, unless FSDP has done so."""
        compute = self.setting.compute
        if compute.world.size > 1 and not self.setting.placement.fsdp:
            with compute.regions("communication"):
                params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                if optimizer in self._packings:
                    packed = self._packings[optimizer].gradients
                    grads = [packed[param].packed.entries for param in params]
                else:
                    grads = [param.grad for param in params]
                compute.world.average_([*grads, *(forget_grads or ())])

    def _record(self, losses: dict[str, Tensor], micro_losses: dict[str, Tensor]) -> None:
        """Add a micro-batch's share to the losses."""
        for name, loss in micro_losses.items():
            share = loss / self.options.gradient_accumulation_steps
            losses[name] = losses[name] + share if name in losses else share

    # ---- the score network

    def _score_gradients(self, micros: list[tuple[Streams, Batch]], losses: dict[str, Tensor]) -> None:
        """Add the gradient of L_psi (Eq. 3) to psi's, the mean over micro-batches and processes."""
        for streams, batch in micros:
            self._score_backward(streams, batch, losses)
        self._average(self.score_optimizer)

    def _score_backward(self, streams: Streams, batch: Batch, losses: dict[str, Tensor]) -> None:
        z = self._noise(streams, batch, "score", "z")
        eps = self._noise(streams, batch, "score", "eps")
        t = self._timesteps(streams, batch, "score")
        inputs = [z, eps, t, batch.labels, batch.teacher_labels, *self.guidance.drawn(streams, batch)]
        for piece in self._pieces(batch):
            part, place = batch.part(piece)
            name = "score dropout" if piece == "both" else f"score dropout {piece}"
            seed = streams.dropout_seed(name, self.setting.compute.world.rank)
            tensors = [tensor[place] for tensor in inputs]
            arguments = (self.losses.score_gradient, self.score, seed, tensors, part.retained)
            micro_losses, _ = self._calls("score step", *arguments)
            self._record(losses, micro_losses)

    # ---- the generator

    def _generator_gradients(
        self, micros: list[tuple[Streams, Batch]], losses: dict[str, Tensor]
    ) -> Iterator[dict[str, Any]]:
        """Compute the gradients of each of theta's steps in turn; yields the step's arguments for the optimizer."""
        mask = None if self.masker is None else self.masker.mask
        if self.update == "alternate":
            for part in ("forget", "retain"):
                for streams, batch in micros:
                    self._generator_backward(streams, batch, losses, False, part=part)
                self._average(self.generator_optimizer)
                yield {"mask": mask if part == "forget" or self.mask_scope == "all" else None}
            return
        separate = self.masker is not None and self.mask_scope == "forget"
        forget_grads: list[Tensor] | None = None
        for streams, batch in micros:
            forget_grads = self._generator_backward(streams, batch, losses, separate, forget_grads)
        self._average(self.generator_optimizer, forget_grads)
        yield {"mask": mask, "masked_grads": forget_grads}

    def _generator_backward(
        self,
        streams: Streams,
        batch: Batch,
        losses: dict[str, Tensor],
        separate: bool,
        forget_grads: list[Tensor] | None = None,
        part: Part = "both",
    ) -> list[Tensor] | None:
        """Add the gradient of L_theta (Eq. 4-7) to theta's.

        With ``separate`` that is the gradient of L_distill alone; the gradient of L_forget, one tensor a parameter, is
        added to ``forget_grads`` and returned. The optimizer combines the two.
        """
        z = self._noise(streams, batch, "generator", "z")
        eps = self._noise(streams, batch, "generator", "eps")
        t = self._timesteps(streams, batch, "generator")
        for piece in self._pieces(batch, part):
            samples, place = batch.part(piece)
            seed = streams.dropout_seed(f"generator dropout {piece}", self.setting.compute.world.rank)
            tensors = [z[place], eps[place], t[place], samples.labels, samples.teacher_labels]
            micro_losses, forget_grads = self._calls(
                "generator step",
                self.losses.generator_gradient,
                self.generator,
                seed,
                tensors,
                samples.retained,
                separate and piece != "retain",
                forget_grads=forget_grads,
            )
            self._record(losses, micro_losses)
        return forget_grads
