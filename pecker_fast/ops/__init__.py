"""Functional operators. Each takes ``backend=None`` ("cuda", "triton", "cpu" or "reference"; None: by device).

What they compute is defined in ``reference.py``; ``schemas.py`` has the conventions. In C++ and under ``torch.compile``
they are ``torch.ops.pecker_fast.*``.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .dispatch import backend_reasons, chosen_backend, resolve, set_backend
from .extension import why_missing
from .layout import PACK_BLOCK, SUM_COLUMNS, WORD_BITS, num_blocks, num_words, word_offsets
from .means import magnitude_means
from .packed import needs_packed_values, step_on_packed_values
from .reference import bias_table, compute_dtype, pack_bits, unpack_bits

__all__ = [
    "PACK_BLOCK",
    "WORD_BITS",
    "accumulate_",
    "apply_mask_",
    "backend_reasons",
    "bias_table",
    "block_counts",
    "compute_dtype",
    "count_nonfinite",
    "l2_fetch_granularity",
    "magnitude_means",
    "magnitude_sums",
    "masked_adam_",
    "num_blocks",
    "num_words",
    "pack",
    "pack_bits",
    "radix_histogram",
    "select",
    "set_backend",
    "threshold_mask",
    "unpack",
    "unpack_bits",
    "word_offsets",
]

MaskRows = tuple[Tensor, Tensor, Tensor, Tensor]


def radix_histogram(
    scores: Sequence[Tensor],
    prefixes: Tensor,
    level: int,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Counts of one level of a radix selection: int64 [m, bins] for int32 ``prefixes`` [m]. See ``schemas.py``."""
    return resolve("radix_histogram", prefixes.device, backend)(scores, prefixes, level, relative_to, damping)


def threshold_mask(
    scores: Sequence[Tensor],
    keys: Tensor,
    tie_limits: Tensor,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
    *,
    backend: str | None = None,
) -> MaskRows:
    """Mask rows of the entries above keys[j] and the first tie_limits[j] at it.

    Returns words int32 [m, W], thresholds float32 [m], counts int64 [m], nan_count int64 [].
    """
    return resolve("threshold_mask", keys.device, backend)(scores, keys, tie_limits, relative_to, damping)


def select(
    scores: Sequence[Tensor],
    ks: Tensor,
    ties_all: bool = False,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
    *,
    backend: str | None = None,
) -> MaskRows:
    """Mask rows of the ks[j] entries of largest magnitude over all tensors together; ``ks`` int64 [m].

    Returns words int32 [m, W], thresholds float32 [m], counts int64 [m], nan_count int64 [].
    """
    return resolve("select", ks.device, backend)(scores, ks, ties_all, relative_to, damping)


def magnitude_sums(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """Exact sums of the magnitudes of each tensor, by windows of exponents: int64 [n, SUM_COLUMNS].

    ``magnitude_means`` makes means of them.
    """
    if not tensors:
        return torch.zeros((0, SUM_COLUMNS), dtype=torch.int64)
    return resolve("magnitude_sums", tensors[0].device, backend)(tensors)


def block_counts(
    words: Tensor, word_offsets: Sequence[int], numels: Sequence[int], *, backend: str | None = None
) -> Tensor:
    """Set bits in each block of ``PACK_BLOCK`` entries, tensors in order: int64."""
    return resolve("block_counts", words.device, backend)(words, word_offsets, numels)


def pack(dense: Tensor, words: Tensor, count: int, *, backend: str | None = None) -> Tensor:
    """The ``count`` entries of ``dense`` whose bit is set, in order: [count]."""
    return resolve("pack", dense.device, backend)(dense, words, count)


def unpack(packed: Tensor, words: Tensor, numel: int, *, backend: str | None = None) -> Tensor:
    """``packed`` spread over ``numel`` entries where the mask is set, zero elsewhere: [numel]."""
    return resolve("unpack", packed.device, backend)(packed, words, numel)


def apply_mask_(
    tensors: Sequence[Tensor], words: Tensor, word_offsets: Sequence[int], *, backend: str | None = None
) -> None:
    """Sets the entries of ``tensors`` outside the mask to 0, in place."""
    resolve("apply_mask_", words.device, backend)(tensors, words, word_offsets)


def accumulate_(
    accumulators: Sequence[Tensor], grads: Sequence[Tensor], reduce: str, *, backend: str | None = None
) -> None:
    """Adds each gradient ("sum"), its magnitude ("abs_sum") or its square ("sq_sum") to its accumulator, in place."""
    if accumulators:
        resolve("accumulate_", accumulators[0].device, backend)(accumulators, grads, reduce)


def count_nonfinite(
    grads: Sequence[Tensor | None],
    masked_grads: Sequence[Tensor | None],
    words: Tensor | None,
    word_offsets: Sequence[int],
    grad_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Number of inf and NaN among the gradients that ``masked_adam_`` would use: int64 []."""
    tensors = [t for t in [*grads, *masked_grads, words] if t is not None]
    run = resolve("count_nonfinite", tensors[0].device, backend)
    return run(grads, masked_grads, words, word_offsets, grad_scale)


def l2_fetch_granularity(device: torch.device, size: int | None = None) -> int:
    """Bytes that the CUDA ``device`` reads from DRAM at a time at most, after setting it to ``size`` (32, 64 or 128).

    It holds for the whole process. With 32 a masked step of low density fetches less that it does not need; the
    benchmark ``fetch_granularity`` tells whether that is faster. Needs the compiled CUDA kernels.
    """
    if size not in (None, 32, 64, 128):
        raise ValueError(f"size is {size}, expected 32, 64 or 128")
    reason = why_missing("cuda")
    if reason is not None:
        raise RuntimeError(f"l2_fetch_granularity needs the compiled CUDA kernels: {reason}")
    with torch.cuda.device(device):
        return torch.ops.pecker_fast.l2_fetch_granularity(size or 0)


def masked_adam_(params: Sequence[Tensor], *args: Any, backend: str | None = None, **kwargs: Any) -> None:
    """One plain, masked or joint Adam step, in place. Arguments and equations: ``reference.masked_adam_``."""
    if not params:
        return
    device = params[0].device
    step = resolve("masked_adam_", device, backend)
    grads, exp_avg_sqs, masters, emas, packed_offsets = args[0], args[3], args[5], args[6], args[13]
    if (
        packed_offsets is not None
        and chosen_backend("masked_adam_", device, backend) == "triton"
        and needs_packed_values(params, grads, masters, emas, exp_avg_sqs)
    ):
        # Its kernel knows packed moments only.
        packing = partial(pack, backend=backend), partial(unpack, backend=backend)
        step_on_packed_values(step, *packing, params, *args, **kwargs)
        return
    step(params, *args, **kwargs)
