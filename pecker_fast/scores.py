"""The scores of a selection: a module's gradients, a mapping or several tensors; alone or relative to others."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .flat import contiguous_grads, describe
from .mask import SaliencyMask
from .ops.checks import SCORE_DTYPES
from .sharding import local, shard_group

Scores = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


class ScoreTensors:
    """The scores of a call: names, shapes and tensors. A gradient that is missing counts as zeros."""

    def __init__(self, scores: Scores, argument: str = "scores") -> None:
        self.argument = argument
        self.params = None
        self.names = None
        if isinstance(scores, nn.Module):
            named = [(name, param) for name, param in scores.named_parameters() if param.requires_grad]
            self.names = [name for name, _ in named]
            self.params = [param for _, param in named]
            values = [param.grad for param in self.params]
            if self.params and all(value is None for value in values):
                raise ValueError(
                    f"none of the model's {len(self.params)} parameters that require grad has a gradient: "
                    "call loss.backward() first, or pass the scores themselves"
                )
            fallback = self.params[0].device if self.params else torch.device("cpu")
        elif isinstance(scores, Tensor):
            raise TypeError(
                f"{argument} is one tensor, expected a module, a mapping of tensors or several tensors: [{argument}]"
            )
        else:
            if isinstance(scores, Mapping):
                self.names = list(scores)
                values = list(scores.values())
            else:
                if not isinstance(scores, Iterable):
                    kind = type(scores).__name__
                    raise TypeError(f"{argument} is {kind}, expected a module, a mapping of tensors or several tensors")
                values = list(scores)
            for i, value in enumerate(values):
                if not isinstance(value, Tensor):
                    raise TypeError(f"{self.label(i)} is {type(value).__name__}, expected a tensor")
            fallback = torch.device("cpu")
        self.group = shard_group([*(self.params or ()), *(value for value in values if value is not None)], argument)
        # Of sharded tensors this process sees its part.
        values = [None if value is None else local(value) for value in values]
        self.shapes = [local(param).shape for param in self.params or ()] or [value.shape for value in values]
        self.present = [i for i, value in enumerate(values) if value is not None]
        tensors = [values[i] for i in self.present]
        for i, value in zip(self.present, tensors, strict=True):
            if value.layout is not torch.strided or value.dtype not in SCORE_DTYPES:
                raise TypeError(f"{self.label(i)} is a {describe(value)}, expected dense float32, bfloat16 or float16")
            if value.device != tensors[0].device:
                raise ValueError(f"{self.label(i)} is on {value.device}, others are on {tensors[0].device}")
        self.device = tensors[0].device if tensors else fallback
        self.numels = [math.prod(shape) for shape in self.shapes]
        self.numel = sum(self.numels)
        self.tensors = contiguous_grads([value.detach() if value.requires_grad else value for value in tensors])

    def label(self, i: int) -> str:
        """The tensor in words."""
        return f"{self.argument} {self.names[i]!r}" if self.names is not None else f"{self.argument}[{i}]"

    def all_words(self, words: Tensor) -> Tensor:
        """Mask rows of all tensors, [m, W], from those of the tensors present, [m, w]."""
        if len(self.present) == len(self.shapes):
            return words
        offsets = ops.word_offsets(self.numels)
        full = words.new_zeros((words.shape[0], offsets[-1]))
        start = 0
        for i in self.present:
            width = offsets[i + 1] - offsets[i]
            full[:, offsets[i] : offsets[i + 1]] = words[:, start : start + width]
            start += width
        return full

    def masks(self, words: Tensor, thresholds: Tensor, nan_count: Tensor) -> list[SaliencyMask]:
        """One mask for each row of words [m, W] and thresholds [m, ...]; they share what describes the tensors."""
        first = SaliencyMask(
            words[0], self.shapes, self.names, threshold=thresholds[0], nan_count=nan_count, params=self.params
        )
        others = zip(words[1:], thresholds[1:], strict=True)
        return [first, *(first._with_words(row, threshold, nan_count) for row, threshold in others)]


class Ranked(NamedTuple):
    """What a selection ranks: magnitudes, or their quotients by those of other tensors. Arguments of operators."""

    tensors: list[Tensor]
    relative_to: list[Tensor] | None = None
    damping: Tensor | None = None

    def part(self, i: int) -> "Ranked":
        """One tensor alone."""
        if self.relative_to is None or self.damping is None:
            return Ranked([self.tensors[i]])
        return Ranked([self.tensors[i]], [self.relative_to[i]], self.damping[i : i + 1])

    def select(self, ks: Tensor, ties_all: bool, backend: str | None) -> ops.MaskRows:
        return ops.select(self.tensors, ks, ties_all, self.relative_to, self.damping, backend=backend)

    def threshold_mask(self, keys: Tensor, tie_limits: Tensor, backend: str | None) -> ops.MaskRows:
        return ops.threshold_mask(self.tensors, keys, tie_limits, self.relative_to, self.damping, backend=backend)

    def histogram(self, prefixes: Tensor, level: int, backend: str | None) -> Tensor:
        return ops.radix_histogram(self.tensors, prefixes, level, self.relative_to, self.damping, backend=backend)


def relative_to_others(scores: ScoreTensors, relative_to: Scores, damping: float, backend: str | None) -> Ranked:
    """Quotients of the scores that are present by what ``relative_to`` has in their places."""
    others = ScoreTensors(relative_to, "relative_to")
    if len(others.shapes) != len(scores.shapes):
        raise ValueError(f"relative_to has {len(others.shapes)} tensors, scores has {len(scores.shapes)}")
    places = list(range(len(scores.shapes)))
    if scores.names is not None and others.names is not None:
        place_of = {name: place for place, name in enumerate(others.names)}
        missing = [name for name in scores.names if name not in place_of]
        if missing:
            raise ValueError(f"relative_to has no {missing[0]!r}, which scores has")
        places = [place_of[name] for name in scores.names]
    for i, place in enumerate(places):
        if others.shapes[place] != scores.shapes[i]:
            raise ValueError(
                f"{others.label(place)} has shape {tuple(others.shapes[place])}, "
                f"{scores.label(i)} has {tuple(scores.shapes[i])}"
            )
    if (others.group is None) != (scores.group is None):
        raise ValueError("scores and relative_to must be sharded alike")
    present = dict(zip(others.present, others.tensors, strict=True))
    denominators = []
    for i, tensor in zip(scores.present, scores.tensors, strict=True):
        other = present.get(places[i])
        if other is None:
            other = torch.zeros_like(tensor)
        if other.dtype != tensor.dtype:
            raise TypeError(f"{others.label(places[i])} is {other.dtype}, expected {tensor.dtype} as {scores.label(i)}")
        if other.device != tensor.device:
            raise ValueError(f"{others.label(places[i])} is on {other.device}, {scores.label(i)} on {tensor.device}")
        denominators.append(other)
    sums = ops.magnitude_sums(denominators, backend=backend)
    if scores.group is not None:
        # The mean is that of the whole tensor. Ranks may differ in what is present.
        whole = torch.zeros((len(scores.shapes), sums.shape[1]), dtype=torch.int64, device=scores.device)
        for i, row in zip(scores.present, sums, strict=True):
            whole[i] = row
        dist.all_reduce(whole, group=scores.group)
        sums = torch.stack([whole[i] for i in scores.present]) if scores.present else sums
    return Ranked(scores.tensors, denominators, (damping * ops.magnitude_means(sums)).float())
