"""block_counts, pack and unpack. The signatures are those of ``pecker_fast/ops/schemas.py``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bits import count_bits, load_bits
from .tables import Chunks, numbers

PACK_BLOCK = 16384
# Entries a program packs or unpacks: the ranks within it come from one scan over 8 warps.
BLOCK = 2048
WARPS = 8


@triton.jit
def _block_counts_kernel(words, word_offsets, chunks, counts, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    tensor = tl.load(chunks + 4 * chunk)
    start = tl.load(chunks + 4 * chunk + 1)
    numel = tl.load(chunks + 4 * chunk + 2)
    number = tl.load(chunks + 4 * chunk + 3)
    index = (start >> 5) + tl.arange(0, BLOCK // 32)
    word = tl.load(words + tl.load(word_offsets + tensor) + index, mask=index * 32 < numel, other=0)
    # Bits past the end do not count.
    rest = tl.minimum(tl.maximum(numel - index * 32, 0), 32).to(tl.int64)
    valid = ((tl.full((BLOCK // 32,), 1, tl.int64) << rest) - 1).to(tl.int32)
    tl.store(counts + number, tl.sum(count_bits(word & valid).to(tl.int64), axis=0))


@triton.jit
def _pack_kernel(dense, words, before, packed, numel, BLOCK: tl.constexpr, UNPACK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    entries = block * BLOCK + tl.arange(0, BLOCK)
    valid = entries < numel
    bit = load_bits(words, entries, valid)
    slot = tl.load(before + block) + tl.cumsum(bit, axis=0) - bit
    chosen = valid & (bit != 0)
    if UNPACK:
        value = tl.load(packed + slot, mask=chosen, other=0)
        tl.store(dense + entries, value, mask=valid)
    else:
        value = tl.load(dense + entries, mask=chosen)
        tl.store(packed + slot, value, mask=chosen)


def _counts(words: Tensor, word_offsets: Sequence[int], numels: Sequence[int], block: int) -> Tensor:
    device = words.device
    chunks = Chunks(numels, block, device)
    counts = torch.empty(chunks.total, dtype=torch.int64, device=device)
    if chunks.count:
        _block_counts_kernel[(chunks.count,)](
            words, numbers(list(word_offsets)[: len(numels)], torch.int64, device), chunks.table, counts, BLOCK=block
        )
    return counts


def block_counts(words: Tensor, word_offsets: Sequence[int], numels: Sequence[int]) -> Tensor:
    return _counts(words, word_offsets, numels, PACK_BLOCK)


def _run(dense: Tensor, words: Tensor, packed: Tensor, unpack: bool) -> None:
    numel = dense.numel()
    if numel == 0:
        return
    counts = _counts(words, [0], [numel], BLOCK)
    before = counts.cumsum(0) - counts
    _pack_kernel[(before.numel(),)](dense, words, before, packed, numel, BLOCK=BLOCK, UNPACK=unpack, num_warps=WARPS)


def pack(dense: Tensor, words: Tensor, count: int) -> Tensor:
    packed = dense.new_empty(count)
    _run(dense, words, packed, unpack=False)
    return packed


def unpack(packed: Tensor, words: Tensor, numel: int) -> Tensor:
    dense = packed.new_empty(numel)
    _run(dense, words, packed, unpack=True)
    return dense
