"""saliency_mask: the entries of largest gradient magnitude, exactly, over a whole model. SaliencyAccumulator."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .flat import FlatView, contiguous_grads, describe
from .mask import SaliencyMask
from .ops.checks import SCORE_DTYPES
from .ops.layout import ALL_TIES, INF_KEY, RADIX_BITS
from .ops.radix_select import radix_select
from .sharding import local, shard_group

Scores = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


class _Scores:
    """The scores of a call: names, shapes, and the tensors that are there (a missing gradient counts as zeros)."""

    def __init__(self, scores: Scores) -> None:
        self.params = None
        self.names = None
        if isinstance(scores, nn.Module):
            named = [(name, param) for name, param in scores.named_parameters() if param.requires_grad]
            self.names = [name for name, _ in named]
            self.params = [param for _, param in named]
            values = [param.grad for param in self.params]
            fallback = self.params[0].device if self.params else torch.device("cpu")
        elif isinstance(scores, Tensor):
            raise TypeError(
                "scores is one tensor, expected a module, a mapping of tensors or several tensors: [scores]"
            )
        else:
            if isinstance(scores, Mapping):
                self.names = list(scores)
                values = list(scores.values())
            else:
                values = list(scores)
            for i, value in enumerate(values):
                if not isinstance(value, Tensor):
                    raise TypeError(f"scores {self._label(i)} is {type(value).__name__}, expected a tensor")
            fallback = torch.device("cpu")
        self.group = shard_group([*(self.params or ()), *(value for value in values if value is not None)])
        # Of sharded tensors this process sees its part.
        values = [None if value is None else local(value) for value in values]
        self.shapes = [local(param).shape for param in self.params or ()] or [value.shape for value in values]
        self.present = [i for i, value in enumerate(values) if value is not None]
        given = [values[i] for i in self.present]
        for i, value in zip(self.present, given, strict=True):
            if value.layout is not torch.strided or value.dtype not in SCORE_DTYPES:
                raise TypeError(
                    f"scores {self._label(i)} is a {describe(value)}, expected dense float32, bfloat16 or float16"
                )
            if value.device != given[0].device:
                raise ValueError(f"scores {self._label(i)} is on {value.device}, others are on {given[0].device}")
        self.device = given[0].device if given else fallback
        self.numels = [math.prod(shape) for shape in self.shapes]
        self.numel = sum(self.numels)
        self.tensors = contiguous_grads([value.detach() for value in given])

    def _label(self, i: int) -> str:
        return repr(self.names[i]) if self.names is not None else f"[{i}]"

    def all_words(self, words: Tensor) -> Tensor:
        """Mask rows of the tensors present, [m, w], widened to all tensors, [m, W]."""
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

    def mask(self, words: Tensor, threshold: Tensor, nan_count: Tensor) -> SaliencyMask:
        return SaliencyMask(
            words, self.shapes, self.names, threshold=threshold, nan_count=nan_count, params=self.params
        )


@overload
def saliency_mask(
    scores: Scores,
    *,
    density: float,
    scope: Literal["global", "tensor"] = "global",
    ties: Literal["lowest_index", "all"] = "lowest_index",
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> SaliencyMask: ...


@overload
def saliency_mask(
    scores: Scores,
    *,
    k: int,
    scope: Literal["global", "tensor"] = "global",
    ties: Literal["lowest_index", "all"] = "lowest_index",
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> SaliencyMask: ...


@overload
def saliency_mask(
    scores: Scores,
    *,
    threshold: float,
    scope: Literal["global", "tensor"] = "global",
    ties: Literal["lowest_index", "all"] = "lowest_index",
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> SaliencyMask: ...


@overload
def saliency_mask(
    scores: Scores,
    *,
    density: Sequence[float],
    scope: Literal["global", "tensor"] = "global",
    ties: Literal["lowest_index", "all"] = "lowest_index",
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> list[SaliencyMask]: ...


@overload
def saliency_mask(
    scores: Scores,
    *,
    k: Sequence[int],
    scope: Literal["global", "tensor"] = "global",
    ties: Literal["lowest_index", "all"] = "lowest_index",
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> list[SaliencyMask]: ...


@overload
def saliency_mask(
    scores: Scores,
    *,
    threshold: Sequence[float],
    scope: Literal["global", "tensor"] = "global",
    ties: Literal["lowest_index", "all"] = "lowest_index",
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> list[SaliencyMask]: ...


def saliency_mask(
    scores: Scores,
    *,
    density: float | Sequence[float] | None = None,
    k: int | Sequence[int] | None = None,
    threshold: float | Sequence[float] | None = None,
    scope: Literal["global", "tensor"] = "global",
    ties: Literal["lowest_index", "all"] = "lowest_index",
    group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> SaliencyMask | list[SaliencyMask]:
    """The mask m = 1(|score| >= gamma) of PECKER (its equation 10) and SalUn, over all tensors at once.

    gamma is given, or is the k-th largest magnitude, found exactly, without concatenating or sorting the scores.

    Parameters
    ----------
    scores : nn.Module, mapping of str to Tensor, or sequence of Tensor
        A module stands for the .grad of its ``named_parameters()`` that require grad; a None grad counts as zeros.
        float32, bfloat16 and float16 in any mixture (compared as float32), any shape and strides, on one device. They
        are only read. Tensors that are not contiguous are copied for the call.
    density : float or sequence of float
        Share of entries to keep, in (0, 1]: k = max(1, int(density * N)) of all N entries.
    k : int or sequence of int
        Number of entries to keep, from 1 to N.
    threshold : float or sequence of float
        Keep every entry of at least this magnitude, >= 0. Exactly one of density, k and threshold must be given. A
        sequence gives a list of masks, found in one call.
    scope : {"global", "tensor"}
        Whether density, k or threshold holds over all tensors together, or within each tensor.
    ties : {"lowest_index", "all"}
        Of entries as large as the k-th, keep the first ones (tensors in order, then row-major index), so that exactly k
        are kept; or keep all of them.
    group : ProcessGroup, optional
        Its ranks each hold a part of the scores: selects the k largest over all ranks, ties by (rank, index). Each rank
        gets the mask of its own part with the threshold of the whole. Collective. Scores that are DTensors (FSDP2)
        bring their group along; the mask covers the local shards.
    backend : {"cuda", "triton", "cpu", "reference"}, optional
        By default the best one for the device.

    Returns
    -------
    SaliencyMask or list of SaliencyMask
        Entries that are zero or NaN are never salient, so fewer than k may be kept; NaN are counted in
        ``mask.nan_count``. inf is the largest magnitude. The masks of all back ends are bit-identical.

    Raises
    ------
    ValueError, TypeError
        If an argument is wrong; the message names it and what is allowed.

    Examples
    --------
    >>> loss.backward()
    >>> mask = saliency_mask(model, density=0.1)
    >>> sparse, dense = saliency_mask(model, density=(0.01, 0.5))
    """
    rows = _Rows(density, k, threshold)
    if scope not in ("global", "tensor"):
        raise ValueError(f'scope is {scope!r}, expected "global" or "tensor"')
    if ties not in ("lowest_index", "all"):
        raise ValueError(f'ties is {ties!r}, expected "lowest_index" or "all"')
    if group is not None and scope == "tensor":
        raise ValueError('group is for scope="global"')
    values = _Scores(scores)
    group = values.group if group is None else group
    if group is not None and scope == "tensor":
        raise ValueError('scores are sharded, which is for scope="global"')
    if values.numel == 0 and group is None:
        raise ValueError("scores has no entries to select from")
    with torch.no_grad():
        if scope == "tensor":
            masks = _select_per_tensor(values, rows, ties == "all", backend)
        else:
            if group is not None:
                results = _select_in_group(values, rows, ties == "all", group, backend)
            else:
                results = _select(values.tensors, values.numel, values.device, rows, ties == "all", backend)
            words, thresholds, _, nan_count = results
            words = values.all_words(words)
            masks = [values.mask(words[j], thresholds[j], nan_count) for j in range(len(rows.values))]
    return masks if rows.several else masks[0]


class _Rows:
    """The densities, ks or thresholds of a call, checked; one mask for each."""

    def __init__(self, density, k, threshold) -> None:
        given = {"density": density, "k": k, "threshold": threshold}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of density, k and threshold, got {', '.join(given) or 'none'}")
        ((self.kind, value),) = given.items()
        self.several = isinstance(value, Sequence) and not isinstance(value, str)
        self.values = list(value) if self.several else [value]
        if not self.values:
            raise ValueError(f"{self.kind} is empty, expected at least one value")
        for value in self.values:
            self._check(value)

    def _check(self, value) -> None:
        kinds = (int,) if self.kind == "k" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            wanted = "an integer" if self.kind == "k" else "a number"
            raise TypeError(f"{self.kind} is {value!r}, expected {wanted} or a sequence of them")
        if self.kind == "density" and not 0 < value <= 1:
            raise ValueError(f"density is {value}, expected a share in (0, 1]")
        if self.kind == "k" and value < 1:
            raise ValueError(f"k is {value}, expected at least 1")
        if self.kind == "threshold" and not value >= 0:
            raise ValueError(f"threshold is {value}, expected a magnitude >= 0")

    def ks(self, numel: int) -> list[int]:
        """Entries to keep of ``numel``."""
        if self.kind == "density":
            return [max(1, int(value * numel)) for value in self.values]
        for value in self.values:
            if value > numel:
                raise ValueError(f"k is {value}, expected at most the number of entries, {numel}")
        return self.values

    def keys(self, device: torch.device) -> Tensor:
        """Thresholds as int32 keys: of the smallest float32 that is not below the threshold, at least 1."""
        exact = np.asarray(self.values, dtype=np.float64)
        with np.errstate(over="ignore"):
            rounded = exact.astype(np.float32)
        up = np.where(rounded < exact, np.nextafter(rounded, np.float32(math.inf)), rounded)
        return _numbers(up.view(np.int32).clip(1, INF_KEY).tolist(), torch.int32, device)


def _numbers(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers as a tensor.

    ``torch.tensor`` would copy them to a GPU from pageable memory: that waits for the device and cannot be captured.
    """
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    numbers = torch.empty(len(values), dtype=dtype, device=device)
    for i, value in enumerate(values):
        numbers[i].fill_(value)
    return numbers


def _all_ties(rows: _Rows, device: torch.device) -> Tensor:
    return torch.full((len(rows.values),), ALL_TIES, dtype=torch.int64, device=device)


def _select(tensors, numel, device, rows: _Rows, ties_all: bool, backend):
    if rows.kind == "threshold":
        return ops.threshold_mask(tensors, rows.keys(device), _all_ties(rows, device), backend=backend)
    return ops.select(tensors, _numbers(rows.ks(numel), torch.int64, device), ties_all, backend=backend)


def _select_per_tensor(values: _Scores, rows: _Rows, ties_all: bool, backend) -> list[SaliencyMask]:
    for numel in values.numels:
        if numel and rows.kind == "k":
            rows.ks(numel)
    m = len(rows.values)
    words = [torch.zeros((m, 0), dtype=torch.int32, device=values.device)]
    thresholds = torch.full((len(values.shapes), m), math.inf, device=values.device)
    nan_count = torch.zeros((), dtype=torch.int64, device=values.device)
    for i, tensor in zip(values.present, values.tensors, strict=True):
        if tensor.numel() == 0:
            continue
        row_words, thresholds[i], _, nans = _select([tensor], tensor.numel(), values.device, rows, ties_all, backend)
        words.append(row_words)
        nan_count += nans
    full = values.all_words(torch.cat(words, dim=1))
    return [values.mask(full[j], thresholds[:, j].contiguous(), nan_count) for j in range(m)]


def _select_in_group(values: _Scores, rows: _Rows, ties_all: bool, group, backend):
    """Selection over the ranks of ``group``: histograms are summed, ties are dealt out in the order of the ranks."""
    device = values.device

    def total(tensor: Tensor, op=dist.ReduceOp.SUM) -> Tensor:
        dist.all_reduce(tensor, op=op, group=group)
        return tensor

    numel = int(total(torch.tensor(values.numel, device=device)))
    if numel == 0:
        raise ValueError("scores has no entries to select from on any rank")
    if rows.kind == "threshold":
        keys, limits = rows.keys(device), _all_ties(rows, device)
    else:
        last: dict[str, Tensor] = {}

        def histogram(prefixes: Tensor, level: int) -> Tensor:
            counts = ops.radix_histogram(values.tensors, prefixes, level, backend=backend)
            last["local"], last["prefixes"] = counts, prefixes
            return total(counts.clone())

        ks = _numbers(rows.ks(numel), torch.int64, device)
        keys, limits = radix_select(histogram, ks, ties_all)
        # Entries of this rank at the key: the last level's bin, unless everything is kept (key 1, no limit).
        digits = (keys & ((1 << RADIX_BITS[-1]) - 1)).long()
        ties = last["local"].gather(1, digits.unsqueeze(1)).squeeze(1)
        by_rank = [torch.empty_like(ties) for _ in range(dist.get_world_size(group))]
        dist.all_gather(by_rank, ties, group=group)
        earlier = torch.stack(by_rank)[: dist.get_rank(group)].sum(0)
        limits = torch.where(limits == ALL_TIES, limits, (limits - earlier).clamp(min=0))
    words, thresholds, counts, nan_count = ops.threshold_mask(values.tensors, keys, limits, backend=backend)
    return words, total(thresholds, dist.ReduceOp.MIN), counts, nan_count


class SaliencyAccumulator:
    """Scores summed over several backward passes, in float32, one tensor for each parameter.

    Parameters
    ----------
    model : nn.Module or iterable
        A module, whose parameters that require grad are taken, or parameters or (name, parameter) pairs.
    reduce : {"sum", "abs_sum", "sq_sum"}
        "sum" adds signed gradients (the saliency of SalUn and PECKER is its magnitude), "abs_sum" magnitudes,
        "sq_sum" squares (the diagonal of the empirical Fisher information, up to the factor 1 / n).
    backend : str, optional
        As in ``saliency_mask``.

    Examples
    --------
    >>> accumulator = SaliencyAccumulator(model)
    >>> for batch in batches:
    ...     loss(model, batch).backward()
    ...     accumulator.add()
    ...     model.zero_grad()
    >>> mask = accumulator.mask(density=0.5)
    """

    def __init__(self, model: nn.Module | Iterable, reduce: str = "sum", *, backend: str | None = None) -> None:
        if reduce not in ("sum", "abs_sum", "sq_sum"):
            raise ValueError(f'reduce is {reduce!r}, expected "sum", "abs_sum" or "sq_sum"')
        items = model.named_parameters() if isinstance(model, nn.Module) else model
        items = [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(items)]
        items = [(name, param) for name, param in items if param.requires_grad]
        if not items:
            raise ValueError("model has no parameters that require grad")
        self.reduce = reduce
        self.backend = backend
        self.batches = 0
        self._params = dict(items)
        for name, param in items:
            if param.dtype not in SCORE_DTYPES:
                raise TypeError(f"parameter {name} is {param.dtype}, expected float32, bfloat16 or float16")
        self.scores = {
            name: torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format).detach()
            for name, param in items
        }
        self._views = {name: FlatView(local(score)) for name, score in self.scores.items()}

    @torch.no_grad()
    def add(self) -> None:
        """Adds the present ``.grad`` of every parameter and leaves it as it is. None adds nothing."""
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for name, param in self._params.items():
            if param.grad is None:
                continue
            grad = local(param.grad)
            if grad.layout is not torch.strided or grad.dtype not in SCORE_DTYPES:
                raise TypeError(f"the gradient of {name} is a {describe(grad)}, expected a dense floating tensor")
            view = self._views[name]
            accumulators, grads = by_device.setdefault(grad.device, ([], []))
            accumulators.append(view.flatten(local(self.scores[name])))
            grads.append(view.flatten(grad))
        for accumulators, grads in by_device.values():
            ops.accumulate_(accumulators, grads, self.reduce, backend=self.backend)
        self.batches += 1

    def reset(self) -> None:
        """Back to zeros."""
        for score in self.scores.values():
            score.zero_()
        self.batches = 0

    def mask(self, **options) -> SaliencyMask | list[SaliencyMask]:
        """``saliency_mask`` of the accumulated scores; takes its keyword arguments.

        With reduce="sq_sum" a threshold, given or found, refers to the summed squares.
        """
        made = saliency_mask(self.scores, **{"backend": self.backend, **options})
        for mask in made if isinstance(made, list) else [made]:
            mask.bind(list(self._params.values()))
        return made
