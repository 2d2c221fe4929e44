"""radix_histogram and threshold_mask. The signatures are those of ``pecker_fast/ops/schemas.py``.

The exact k-th magnitude comes from three histograms, the mask from a pass that counts ties and one that writes words:
five reads of the scores. Everything is on the device, in a fixed order, without waiting for it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import pack_words
from .tables import Chunks, addresses, numbers

# Entries a program takes: a multiple of 32, long enough that the histogram of a block outweighs adding it to the
# others', short enough for its keys and ranks to stay in registers with 8 warps.
BLOCK = 4096
WARPS = 8
_RADIX_BITS = (11, 10, 10)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

INF_KEY = tl.constexpr(0x7F800000)


@triton.jit
def _load_keys(pointers, chunks, chunk, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of a chunk (0 past its end), and its tensor, first entry and number."""
    tensor = tl.load(chunks + 4 * chunk)
    start = tl.load(chunks + 4 * chunk + 1)
    numel = tl.load(chunks + 4 * chunk + 2)
    number = tl.load(chunks + 4 * chunk + 3)
    entries = start + tl.arange(0, BLOCK)
    data = tl.load(pointers + tensor).to(tl.pointer_type(TYPE))
    values = tl.load(data + entries, mask=entries < numel, other=0.0).to(tl.float32)
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, tensor, start, numel, number


@triton.jit
def _histogram_kernel(
    pointers,
    chunks,
    prefixes,
    histogram,
    TYPE: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    keys, _, _, _, _ = _load_keys(pointers, chunks, tl.program_id(0), TYPE, BLOCK)
    row = tl.program_id(1)
    counted = (keys > 0) & (keys <= INF_KEY)
    if SHIFT + BITS < 31:
        counted = counted & ((keys >> (SHIFT + BITS)) == tl.load(prefixes + row))
    BINS: tl.constexpr = 1 << BITS
    digits = tl.where(counted, (keys >> SHIFT) & (BINS - 1), 0)
    bins = tl.arange(0, BINS)
    # Entries that do not count were put into bin 0: take them out again.
    left_out = BLOCK - tl.sum(counted.to(tl.int32), axis=0)
    counts = tl.histogram(digits, BINS) - tl.where(bins == 0, left_out, 0)
    tl.atomic_add(histogram + row * BINS + bins, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _count_kernel(pointers, chunks, keys, ties, nans, total, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    found, _, _, _, number = _load_keys(pointers, chunks, tl.program_id(0), TYPE, BLOCK)
    row = tl.program_id(1)
    key = tl.load(keys + row)
    tl.store(ties + row * total + number, tl.sum((found == key).to(tl.int64), axis=0))
    if row == 0:
        tl.store(nans + number, tl.sum((found > INF_KEY).to(tl.int64), axis=0))


@triton.jit
def _words_kernel(
    pointers,
    chunks,
    keys,
    tie_limits,
    ties_before,
    word_offsets,
    words,
    counts,
    smallest,
    total,
    width,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    found, tensor, start, numel, number = _load_keys(pointers, chunks, tl.program_id(0), TYPE, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    key = tl.load(keys + row)
    left = tl.load(tie_limits + row) - tl.load(ties_before + row * total + number)
    tie = found == key
    rank = tl.cumsum(tie.to(tl.int32), axis=0)
    kept = ((found > key) & (found <= INF_KEY)) | (tie & (rank <= left))
    tl.store(counts + row * total + number, tl.sum(kept.to(tl.int64), axis=0))
    tl.store(smallest + row * total + number, tl.min(tl.where(kept, found, INF_KEY), axis=0))
    index = (start >> 5) + tl.arange(0, BLOCK // 32)
    out = words + row * width + tl.load(word_offsets + tensor) + index
    tl.store(out, pack_words(kept, BLOCK), mask=index < (numel + 31) // 32)


def _launches(scores: Sequence[Tensor], device: torch.device):
    """For each dtype among the scores its chunks; numbers count the chunks of all."""
    numels = [score.numel() for score in scores]
    for dtype, kind in _TYPES.items():
        chunks = Chunks(numels, BLOCK, device, [score.dtype == dtype for score in scores])
        if chunks.count:
            yield kind, chunks


def radix_histogram(scores: Sequence[Tensor], prefixes: Tensor, level: int) -> Tensor:
    bits = _RADIX_BITS[level]
    m, device = prefixes.shape[0], prefixes.device
    histogram = torch.zeros((m, 1 << bits), dtype=torch.int64, device=device)
    pointers = addresses(scores, device)
    for kind, chunks in _launches(scores, device):
        _histogram_kernel[(chunks.count, m)](
            pointers,
            chunks.table,
            prefixes,
            histogram,
            TYPE=kind,
            SHIFT=sum(_RADIX_BITS[level + 1 :]),
            BITS=bits,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return histogram


def threshold_mask(scores: Sequence[Tensor], keys: Tensor, tie_limits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, device = keys.shape[0], keys.device
    numels = [score.numel() for score in scores]
    offsets = [0]
    for numel in numels:
        offsets.append(offsets[-1] + -(-numel // 32))
    total = sum(-(-numel // BLOCK) for numel in numels)
    pointers = addresses(scores, device)
    word_offsets = numbers(offsets, torch.int64, device)
    words = torch.empty((m, offsets[-1]), dtype=torch.int32, device=device)
    ties = torch.empty((m, total), dtype=torch.int64, device=device)
    nans = torch.empty(total, dtype=torch.int64, device=device)
    counts = torch.empty((m, total), dtype=torch.int64, device=device)
    # One column more, so that there is a smallest one where there are no entries.
    smallest = torch.full((m, total + 1), INF_KEY.value, dtype=torch.int32, device=device)
    if m == 0:
        nans.zero_()
    for kind, chunks in _launches(scores, device):
        if m:
            _count_kernel[(chunks.count, m)](
                pointers, chunks.table, keys, ties, nans, total, TYPE=kind, BLOCK=BLOCK, num_warps=WARPS
            )
    ties_before = ties.cumsum(1) - ties
    per_chunk = smallest[:, :total].contiguous()
    for kind, chunks in _launches(scores, device):
        if m:
            _words_kernel[(chunks.count, m)](
                pointers,
                chunks.table,
                keys,
                tie_limits,
                ties_before,
                word_offsets,
                words,
                counts,
                per_chunk,
                total,
                offsets[-1],
                TYPE=kind,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    smallest[:, :total] = per_chunk
    return words, smallest.amin(1).view(torch.float32), counts.sum(1), nans.sum()
