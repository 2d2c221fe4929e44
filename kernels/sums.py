"""magnitude_sums: exact sums of magnitudes, by windows of exponents: integers, which any order of additions leaves."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import INF_KEY, SUM_COLUMNS, SUM_WINDOWS
from .select import BLOCK, MAX_PROGRAMS, Scores
from .tables import on_device
from .tiles import kernel, keys_of, load_raw, tile_length

_INF_KEY = tl.constexpr(INF_KEY)
_COLUMNS = tl.constexpr(SUM_COLUMNS)
_WINDOWS = tl.constexpr(SUM_WINDOWS)


@triton.jit
def total(values):
    return tl.sum(tl.sum(values, axis=1), axis=0)


@triton.jit
def largest(values):
    return tl.max(tl.max(values, axis=1), axis=0)


@kernel
def sums_kernel(
    addresses,
    others,
    damping,
    numels,
    word_offsets,
    chunk_table,
    n_chunks,
    rows,
    sums,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile has few windows. They are added up one after the other, from the largest down."""
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor = tl.load(chunk_table + chunk)
        start = tl.load(chunk_table + n_chunks + chunk)
        numel = tl.load(numels + tensor)
        keys = keys_of(load_raw(tl.load(addresses + tensor), start, numel, DTYPE, ALIGNED, BLOCK), DTYPE)
        exponents = tl.maximum(keys >> 23, 1)
        significands = tl.where(keys >> 23 > 0, (keys & 0x7FFFFF) | (1 << 23), keys)
        values = significands.to(tl.int64) << (exponents % 16)
        finite = keys < _INF_KEY
        windows = tl.where(finite & (keys > 0), exponents // 16, -1)
        own = sums + tensor * _COLUMNS
        # Past the end there are zeros, which are finite.
        count = tile_length(start, numel, BLOCK) - total((keys >= _INF_KEY).to(tl.int32))
        tl.atomic_add(own + 2 * _WINDOWS, count.to(tl.int64), sem="relaxed")
        window = largest(windows)
        while window >= 0:
            found = total(tl.where(windows == window, values, 0))
            tl.atomic_add(own + window, found & 0xFFFFFFFF, sem="relaxed")
            tl.atomic_add(own + _WINDOWS + window, found >> 32, sem="relaxed")
            window = largest(tl.where(windows < window, windows, -1))


def magnitude_sums(tensors: Sequence[Tensor], *, block: int = BLOCK) -> Tensor:
    device = tensors[0].device
    with on_device(device):
        sums = torch.zeros((len(tensors), SUM_COLUMNS), dtype=torch.int64, device=device)
        Scores(tensors, device, block).launch(sums_kernel, 1, MAX_PROGRAMS, sums)
    return sums
