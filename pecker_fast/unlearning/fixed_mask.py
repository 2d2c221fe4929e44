"""A mask that is chosen once, by what entries matter to forgotten and to retained samples: that of a patch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from operator import or_
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_int, check_literals, check_number
from ..diffusion import OneStepGenerator, predict, prediction_loss
from ..mask import SaliencyMask
from ..mask_in_parts import MaskInParts
from ..patches import file_kind, patch_mask
from ..saliency import SaliencyAccumulator
from .masking import BaseMasker, random_scores
from .setting import Setting
from .streams import Streams
from .trained import sees_condition

# Parts of a network that ``act_on`` knows by a word; everything else is a pattern of parameter names.
PARTS = ("all", "conditioning", "body")


@dataclass(frozen=True)
class FixedMaskOptions:
    """How the entries of the mask are chosen."""

    saliency_score: Literal["ratio", "gradient", "magnitude", "random"] = "ratio"
    """What chooses the entries: the ratio of the Fisher information of forgotten and of retained samples; for
    comparison, the magnitude of the gradient on forgotten samples, the magnitude of the parameters, random numbers."""
    saliency_chunks: int = 64
    """Chunks of generated samples of each kind; each contributes the square of its gradient."""
    saliency_chunk_size: int = 1
    """Samples in a chunk."""
    saliency_damping: float = 0.01
    """Of the ratio: share of a tensor's mean that is added to the Fisher information of its retained samples."""
    act_on: tuple[str, ...] = ("all",)
    """Where the mask may be: all, conditioning (class and time embedding and their projections; cross attention on
    Stable Diffusion), body (the rest), or patterns of parameter names. All of it, if density asks for more."""
    disjoint_from: tuple[str, ...] = ()
    """Patch files, or mask files (mask.safetensors of a run), whose entries the mask leaves out."""

    def check_fixed_mask(self) -> None:
        """Check these options. ValueError or TypeError, naming the option, if one is out of range."""
        check_literals(self)
        for name in ("saliency_chunks", "saliency_chunk_size"):
            check_int(name, getattr(self, name), 1)
        check_number("saliency_damping", self.saliency_damping)
        if not self.act_on:
            raise ValueError(f"act_on is empty, expected some of {', '.join(PARTS)} or patterns of parameter names")


def in_part(name: str, act_on: Iterable[str], text: bool = False) -> bool:
    """Whether ``act_on`` includes a parameter.

    Parameters
    ----------
    name : str
        Of the parameter.
    act_on : iterable of str
        "all", "conditioning", "body", or patterns as of ``fnmatch``.
    text : bool
        Whether the condition is a prompt.
    """
    conditioning = sees_condition(name, text) or (not text and name.startswith("time_embedding."))
    known = {"all": True, "conditioning": conditioning, "body": not conditioning}
    return any(known[part] if part in known else fnmatchcase(name, part) for part in act_on)


def parameter_parts(network: nn.Module, count: int) -> list[list[str]]:
    """The names of a network's parameters in at most ``count`` parts of about as many entries, in order.

    Parameters of one module stay together: its backward pass computes their gradients at once.
    """
    numels = {name: param.numel() for name, param in network.named_parameters()}
    total, before = sum(numels.values()), 0
    parts: dict[int, list[str]] = {}
    place: dict[str, int] = {}
    for name, numel in numels.items():
        module = name.rpartition(".")[0]
        parts.setdefault(place.setdefault(module, before * count // total), []).append(name)
        before += numel
    return list(parts.values())


@contextmanager
def only_trainable(network: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it, only the parameters of these names require gradients, of those that do."""
    chosen = set(names)
    others = [p for name, p in network.named_parameters() if name not in chosen and p.requires_grad]
    for param in others:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in others:
            param.requires_grad_(True)


class PatchMasker(BaseMasker):
    """The one mask of a patch.

    Parameters
    ----------
    setting : Setting
        Of the run.
    options : FixedMaskOptions
        How entries are chosen, with ``t_init`` of the generator.
    generator : nn.Module
        Draws the samples.
    density : float
        Share of all entries.
    anywhere : bool
        Whether to ignore ``act_on`` and ``disjoint_from``.

    Attributes
    ----------
    share : float
        Share of all entries in the mask if every entry that may be chosen has a score.

    Raises
    ------
    ValueError
        If a pattern matches no parameter, or a mask file is missing, damaged or of another network.
    """

    # The current one is also the union of all.
    MASKS = 1

    def __init__(
        self, setting: Setting, options: Any, generator: nn.Module, density: float, *, anywhere: bool = False
    ) -> None:
        super().__init__(setting, density=density)
        problem, compute = setting.problem, setting.compute
        compute.world.check_shares("saliency_chunks", options.saliency_chunks)
        self.options, self.generator = options, generator
        self._saliency_parts = setting.placement.saliency_parts
        self.act_on = ("all",) if anywhere else options.act_on
        self.text = problem.forgets_prompts
        self.one_step = OneStepGenerator(problem.schedule, options.t_init)
        self._conditions = problem.request.conditions(compute.device)
        numels = {name: param.numel() for name, param in problem.teacher.named_parameters()}
        for part in self.act_on:
            if not any(in_part(name, (part,), self.text) for name in numels):
                raise ValueError(
                    f"act_on has {part!r}, which matches no parameter; expected {', '.join(PARTS)} or a pattern of "
                    f'parameter names, such as "mid_block.*" or "{next(iter(numels))}"'
                )
        self._taken = None if anywhere else self._read_masks(options.disjoint_from, problem.teacher)
        taken = {} if self._taken is None else dict(zip(self._taken.names, self._taken.tensor_counts(), strict=True))
        allowed = sum(
            numel - taken.get(name, 0) for name, numel in numels.items() if in_part(name, self.act_on, self.text)
        )
        if allowed == 0:
            raise ValueError(
                f"no entry is left to the patch: disjoint_from has all that act_on ({', '.join(self.act_on)}) allows; "
                "leave a file out of disjoint_from, or let the patch act on more"
            )
        self.share = min(density, allowed / sum(numels.values()))

    def _read_masks(self, paths: Sequence[str], network: nn.Module) -> SaliencyMask | None:
        """The union of the masks in files; None without files."""
        if not paths:
            return None
        names, params = zip(*network.named_parameters(), strict=True)
        masks = []
        for path in paths:
            try:
                mask = patch_mask(path) if file_kind(path) == "patch" else SaliencyMask.load(path)
                mask = mask.to(self.compute.device)
                order = mask.align(params, names)
            except (OSError, ValueError) as error:
                raise ValueError(f"disjoint_from has {path!r}: {error}") from error
            masks.append(SaliencyMask.from_bool({name: mask[i] for name, i in zip(names, order, strict=True)}))
        return reduce(or_, masks)

    def ranking(self, streams: Streams, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        options: dict[str, Any] = {}
        if self.options.saliency_score == "ratio":
            # The root of the ratio would rank entries in the same order.
            options = {"relative_to": self._fisher(streams, network, "retained")}
            options["damping"] = self.options.saliency_damping
        scores = self._scores(streams, network)
        for name, score in scores.items():
            if not in_part(name, self.act_on, self.text):
                score.zero_()
        if self._taken is not None:
            (~self._taken).apply_(scores)
        return scores, options

    def _scores(self, streams: Streams, network: nn.Module) -> dict[str, Tensor]:
        kind = self.options.saliency_score
        if kind == "random":
            return random_scores(streams, network)
        if kind == "magnitude":
            return {name: param.detach().clone() for name, param in network.named_parameters()}
        if kind == "gradient":
            return self._accumulated(streams, network, "forgotten", "sum")
        return self._fisher(streams, network, "forgotten")

    def _fisher(
        self, streams: Streams, network: nn.Module, kind: Literal["forgotten", "retained"]
    ) -> dict[str, Tensor]:
        """The diagonal of the Fisher information, up to a factor that is the same for both kinds."""
        return self._accumulated(streams, network, kind, "sq_sum")

    def _accumulated(
        self,
        streams: Streams,
        network: nn.Module,
        kind: Literal["forgotten", "retained"],
        reduce: Literal["sum", "sq_sum"],
    ) -> dict[str, Tensor]:
        """The prediction losses' gradients of this process's chunks of generated samples, or their squares, summed; the
        mean over the processes. Leaves no gradient behind."""
        compute, schedule, o = self.compute, self.problem.schedule, self.options
        count, size = o.saliency_chunks * o.saliency_chunk_size, o.saliency_chunk_size
        chosen = streams.choose(f"{kind} labels", count, getattr(self._conditions, kind))
        z, eps = (streams.normal(f"{kind} {name}", count, self.problem.sample_shape) for name in ("z", "eps"))
        t = streams.timesteps(f"{kind} t", count, 0, schedule.num_train_timesteps - 1)
        self.generator.eval()
        network.eval()
        accumulator = SaliencyAccumulator(network, reduce)
        share = compute.world.share(o.saliency_chunks)
        with accumulator.consuming():
            for chunk in torch.arange(count, device=compute.device).split(size)[share]:
                with torch.no_grad(), compute.autocast():
                    images = self.one_step(self.generator, z[chunk], chosen[chunk])
                x_t = schedule.add_noise(images, eps[chunk], t[chunk])
                with compute.autocast():
                    prediction = predict(network, schedule, x_t, t[chunk], chosen[chunk])
                prediction_loss(schedule.target(images, eps[chunk], t[chunk]), prediction).backward()
        compute.world.average_(list(accumulator.scores.values()))
        return accumulator.scores

    def select(self, streams: Streams, network: nn.Module) -> SaliencyMask:
        if self._parts == 1:
            return super().select(streams, network)
        shapes = {name: param.shape for name, param in network.named_parameters()}
        k = max(1, int(self.density * sum(shape.numel() for shape in shapes.values())))
        damping = self.options.saliency_damping
        parts = MaskInParts(shapes, k, damping=damping, device=self.compute.device)
        for part in parameter_parts(network, self._parts):
            # Every part is scored on the same samples.
            with self.compute.regions("saliency"), only_trainable(network, part):
                scores, options = self.ranking(streams, network)
            with self.compute.regions("selection"):
                parts.add(scores, options.get("relative_to"))
            del scores, options
        return parts.mask()

    def rehearse(self, streams: Streams, network: nn.Module) -> None:
        if self._parts == 1:
            super().rehearse(streams, network)
            return
        numels = {name: param.numel() for name, param in network.named_parameters()}
        each = 2 if self.options.saliency_score == "ratio" else 1
        entries = each * max(1, int(self.density * sum(numels.values())))
        parts = parameter_parts(network, self._parts)
        sizes = [sum(numels[name] for name in part) for part in parts]
        # What ``MaskInParts`` keeps of earlier parts.
        kept = torch.empty(entries, device=self.compute.device)
        # The part with the longest backward pass, and that with the most scores.
        for i in sorted({0, sizes.index(max(sizes))}):
            with only_trainable(network, parts[i]):
                scores, options = self.ranking(streams, network)
            new = torch.empty(min(entries, each * sizes[i]), device=self.compute.device)
            del scores, options
            # The largest of both replace them.
            merged = torch.empty_like(kept)
            del new, merged
        del kept

    @property
    def _parts(self) -> int:
        """How many parts of the network are scored one after the other; scores that take no gradient need none."""
        return self._saliency_parts if self.options.saliency_score in ("ratio", "gradient") else 1

    def refresh(self, iteration: int, network: nn.Module) -> None:
        due = self.is_due(iteration)
        super().refresh(iteration, network)
        if due and self.mask.count == 0:
            raise ValueError("no entry is left to the patch: act_on and disjoint_from exclude all that have a score")
