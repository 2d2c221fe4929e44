"""saliency_mask: the entries of largest gradient magnitude, exactly, over a whole model. SaliencyAccumulator."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .checks import check_number
from .flat import FlatView, describe
from .mask import SaliencyMask
from .ops.checks import SCORE_DTYPES
from .ops.layout import ALL_TIES, INF_KEY, RADIX_BITS
from .ops.radix_select import radix_select
from .scores import Ranked, Scores, ScoreTensors, relative_to_others
from .sharding import local

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MaskOptions(TypedDict, total=False):
    """The arguments of ``saliency_mask`` that its result's type does not depend on."""

    scope: Literal["global", "tensor"]
    ties: Literal["lowest_index", "all"]
    group: dist.ProcessGroup | None
    relative_to: Scores | None
    damping: float
    backend: str | None


@overload
def saliency_mask(scores: Scores, *, density: float, **options: "Unpack[MaskOptions]") -> SaliencyMask: ...


@overload
def saliency_mask(
    scores: Scores, *, density: Sequence[float], **options: "Unpack[MaskOptions]"
) -> list[SaliencyMask]: ...


@overload
def saliency_mask(scores: Scores, *, k: int, **options: "Unpack[MaskOptions]") -> SaliencyMask: ...


@overload
def saliency_mask(scores: Scores, *, k: Sequence[int], **options: "Unpack[MaskOptions]") -> list[SaliencyMask]: ...


@overload
def saliency_mask(scores: Scores, *, threshold: float, **options: "Unpack[MaskOptions]") -> SaliencyMask: ...


@overload
def saliency_mask(
    scores: Scores, *, threshold: Sequence[float], **options: "Unpack[MaskOptions]"
) -> list[SaliencyMask]: ...


def saliency_mask(
    scores: Scores,
    *,
    density: float | Sequence[float] | None = None,
    k: int | Sequence[int] | None = None,
    threshold: float | Sequence[float] | None = None,
    scope: str = "global",
    ties: str = "lowest_index",
    group: dist.ProcessGroup | None = None,
    relative_to: Scores | None = None,
    damping: float = 0.01,
    backend: str | None = None,
) -> SaliencyMask | list[SaliencyMask]:
    """Mark the entries of largest magnitude over all tensors together: m = 1(|score| >= gamma).

    This is the mask of PECKER (its equation 10) and SalUn. gamma is given, or is the k-th largest magnitude, found
    exactly, without concatenating or sorting the scores.

    With ``relative_to`` entries are ranked by a quotient of magnitudes instead, for example of what matters to the
    request by what matters to the rest:

        q = |s| / (|r| + d mean(|r|)),    m = 1(q >= gamma)

    with s the score, r ``relative_to``, d ``damping``, and the mean taken over the tensor that the entry is in. The
    passes of the selection compute the quotients as they read s and r; no tensor of quotients is made.

    Parameters
    ----------
    scores : Module, mapping of names to tensors, or iterable of tensors
        Of a module: the .grad of its ``named_parameters()`` that require grad; a None grad counts as zeros. float32,
        bfloat16 and float16 in any mixture (compared as float32), any shape and strides, on one device. They are only
        read. Tensors that are not contiguous are copied for the call.
    density : float or sequence of float, optional
        Share of entries to keep, in (0, 1]: k = max(1, int(density * N)) of all N entries.
    k : int or sequence of int, optional
        Entries to keep, from 1 to N.
    threshold : float or sequence of float, optional
        Keep every entry of at least this magnitude, or quotient, >= 0. Exactly one of density, k and threshold is
        given. A sequence gives a list of masks, selected together.
    scope : {"global", "tensor"}
        "global": over all tensors together; "tensor": density, k or threshold holds within each tensor.
    ties : {"lowest_index", "all"}
        Of entries as large as the k-th, "lowest_index" keeps the first ones (tensors in order, then row-major index),
        so that exactly k are kept; "all" keeps every one.
    group : ProcessGroup, optional
        Its ranks each hold a part of the scores: the k largest of all ranks together, ties by (rank, index). Each rank
        gets the mask of its own part; its threshold is that of the whole. Collective. Scores that are DTensors (FSDP2)
        bring their group along; the mask is of the local parts.
    relative_to : Module, mapping of names to tensors, or iterable of tensors, optional
        As many tensors as ``scores`` has, matched by name if both have names, otherwise by order. Each has the shape,
        dtype, device and sharding of its score. The mean is of the whole tensor if it is sharded (DTensor), and of each
        rank's own tensor with plain tensors and ``group``.
    damping : float
        d, at least 0. It keeps an entry whose score is negligible from being ranked first because r is still smaller
        there. Without ``relative_to`` it has no effect.
    backend : {"cuda", "triton", "cpu", "reference"}, optional
        None: the best one for the device.

    Returns
    -------
    SaliencyMask or list of SaliencyMask
        Entries that are zero or NaN are never salient, so fewer than k may be kept; NaN are counted in
        ``mask.nan_count``. inf is the largest magnitude. ``mask.threshold`` is the smallest magnitude, or quotient,
        that is kept. The masks of all back ends are bit-identical.

    Raises
    ------
    ValueError, TypeError
        Names the argument that is wrong, and what is allowed.

    Notes
    -----
    Quotients are float32 for every dtype. The mean is that of the finite |r| (0 if there are none). Their sum is exact,
    so it is the same for any number of threads, any launch and any back end; for shards of DTensors it is that of the
    whole tensor. d mean is rounded to float32, then |r| + d mean is, which counts as 2 ** -126 (the smallest normal
    number) if it is below, then the quotient is. It follows that

    * a NaN in s or r, and inf / inf, give NaN: counted, never salient;
    * 0 / 0 is 0, like 0 over any other number: never salient, not counted;
    * a finite s over an infinite r is 0; an infinite s over a finite r, and a quotient that overflows, is inf.

    If s and r are sums of squared gradients (``SaliencyAccumulator`` with reduce="sq_sum", both over as many
    gradients), q is a ratio of two diagonals of empirical Fisher information. Its root ranks entries in the same
    order, so no root is taken, and thresholds are those of the ratio without the root. Rounding differs: quotients
    that are equal in float32 are ties although the exact ratios may differ, and a rounded root would tie some more.
    """
    rows = _Rows(density, k, threshold)
    if scope not in ("global", "tensor"):
        raise ValueError(f'scope is {scope!r}, expected "global" or "tensor"')
    if ties not in ("lowest_index", "all"):
        raise ValueError(f'ties is {ties!r}, expected "lowest_index" or "all"')
    if group is not None and scope == "tensor":
        raise ValueError('group is for scope="global"')
    if relative_to is not None:
        check_number("damping", damping)
    values = ScoreTensors(scores)
    group = values.group if group is None else group
    if group is not None and scope == "tensor":
        raise ValueError('scores are sharded, which is for scope="global"')
    if values.numel == 0 and group is None:
        raise ValueError("scores has no entries to select from")
    with torch.no_grad():
        ranked = Ranked(values.tensors)
        if relative_to is not None:
            ranked = relative_to_others(values, relative_to, damping, backend)
        if scope == "tensor":
            masks = _select_per_tensor(values, ranked, rows, ties == "all", backend)
        else:
            if group is not None:
                results = _select_in_group(values, ranked, rows, ties == "all", group, backend)
            else:
                results = _select(ranked, values.numel, values.device, rows, ties == "all", backend)
            words, thresholds, _, nan_count = results
            masks = values.masks(values.all_words(words), thresholds, nan_count)
    return masks if rows.several else masks[0]


class _Rows:
    """The densities, ks or thresholds of a call, checked; one mask for each."""

    def __init__(self, density, k, threshold) -> None:
        options = {"density": density, "k": k, "threshold": threshold}
        options = {name: value for name, value in options.items() if value is not None}
        if len(options) != 1:
            raise ValueError(f"give exactly one of density, k and threshold, got {', '.join(options) or 'none'}")
        ((self.kind, value),) = options.items()
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


def _select(ranked: Ranked, numel: int, device: torch.device, rows: _Rows, ties_all: bool, backend):
    if rows.kind == "threshold":
        return ranked.threshold_mask(rows.keys(device), _all_ties(rows, device), backend)
    return ranked.select(_numbers(rows.ks(numel), torch.int64, device), ties_all, backend)


def _select_per_tensor(
    values: ScoreTensors, ranked: Ranked, rows: _Rows, ties_all: bool, backend
) -> list[SaliencyMask]:
    for numel in values.numels:
        if numel and rows.kind == "k":
            rows.ks(numel)
    m = len(rows.values)
    words = [torch.zeros((m, 0), dtype=torch.int32, device=values.device)]
    thresholds = torch.full((len(values.shapes), m), math.inf, device=values.device)
    nan_count = torch.zeros((), dtype=torch.int64, device=values.device)
    for place, i in enumerate(values.present):
        if values.numels[i] == 0:
            continue
        part = ranked.part(place)
        row_words, thresholds[i], _, nans = _select(part, values.numels[i], values.device, rows, ties_all, backend)
        words.append(row_words)
        nan_count += nans
    full = values.all_words(torch.cat(words, dim=1))
    return values.masks(full, thresholds.T.contiguous(), nan_count)


def _select_in_group(values: ScoreTensors, ranked: Ranked, rows: _Rows, ties_all: bool, group, backend):
    """Selection over the ranks of ``group``: histograms are summed, ties go to the lowest ranks first."""
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
            counts = ranked.histogram(prefixes, level, backend)
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
    words, thresholds, counts, nan_count = ranked.threshold_mask(keys, limits, backend)
    return words, total(thresholds, dist.ReduceOp.MIN), counts, nan_count


class SaliencyAccumulator:
    """Sum scores over several backward passes, in float32, one tensor for each parameter.

    Parameters
    ----------
    model : Module, or iterable of parameters or of (name, parameter) pairs
        Of a module: its parameters that require grad.
    reduce : {"sum", "abs_sum", "sq_sum"}
        "sum": of signed gradients (the saliency of SalUn and PECKER is the magnitude of it); "abs_sum": of magnitudes;
        "sq_sum": of squares (the diagonal of the empirical Fisher information, up to the factor 1 / n).
    backend : str, optional
        As in ``saliency_mask``.

    Examples
    --------
    >>> for batch in batches:
    ...     loss(model, batch).backward()
    ...     accumulator.add()
    ...     model.zero_grad()
    >>> mask = accumulator.mask(density=0.5)
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        reduce: Literal["sum", "abs_sum", "sq_sum"] = "sum",
        *,
        backend: str | None = None,
    ) -> None:
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

    def add(self) -> None:
        """Add the ``.grad`` of every parameter, which stays as it is. None adds nothing."""
        self._add(self._params)
        self.batches += 1

    @contextmanager
    def consuming(self) -> Iterator[None]:
        """Within this context every backward pass adds each gradient as soon as it exists, and drops it.

        In place of ``add`` and ``zero_grad``, with memory for one gradient at a time. ``batches`` does not count these
        passes.

        Raises
        ------
        RuntimeError
            If a parameter has a gradient at the start.
        """
        present = [name for name, param in self._params.items() if param.grad is not None]
        if present:
            raise RuntimeError(f"parameter {present[0]} has a gradient already, expected none: call zero_grad() first")
        names = {param: name for name, param in self._params.items()}

        def take(param: Tensor) -> None:
            self._add([names[param]])
            param.grad = None

        handles = [param.register_post_accumulate_grad_hook(take) for param in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, names: Iterable[str]) -> None:
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for name in names:
            param = self._params[name]
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

    def reset(self) -> None:
        """Set all scores to zero."""
        for score in self.scores.values():
            score.zero_()
        self.batches = 0

    @overload
    def mask(self, *, density: float, **options: "Unpack[MaskOptions]") -> SaliencyMask: ...

    @overload
    def mask(self, *, density: Sequence[float], **options: "Unpack[MaskOptions]") -> list[SaliencyMask]: ...

    @overload
    def mask(self, *, k: int, **options: "Unpack[MaskOptions]") -> SaliencyMask: ...

    @overload
    def mask(self, *, k: Sequence[int], **options: "Unpack[MaskOptions]") -> list[SaliencyMask]: ...

    @overload
    def mask(self, *, threshold: float, **options: "Unpack[MaskOptions]") -> SaliencyMask: ...

    @overload
    def mask(self, *, threshold: Sequence[float], **options: "Unpack[MaskOptions]") -> list[SaliencyMask]: ...

    def mask(self, **options: Any) -> SaliencyMask | list[SaliencyMask]:
        """Call ``saliency_mask`` on the accumulated scores with these keyword arguments.

        With reduce="sq_sum" thresholds, arguments and results, are sums of squares. ``relative_to=other.scores`` ranks
        by the ratio to another accumulator's, see there.
        """
        masks = saliency_mask(self.scores, **{"backend": self.backend, **options})
        for mask in masks if isinstance(masks, list) else [masks]:
            mask.bind(list(self._params.values()))
        return masks
