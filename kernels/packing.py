"""block_counts, pack and unpack: the entries of a mask, counted, gathered in order, and spread again.

``pack`` and ``unpack`` take two launches and a prefix sum over tiles: the set bits of each tile, then the move itself.
Entries are moved as integers of their size. Fixed configuration as in ``pointwise.py``.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ..ops.layout import PACK_BLOCK
from .tables import chunks, int64_table, on_device
from .tiles import exclusive_ranks, kernel, load_words, popcount, tile_bits, tile_length, tile_offsets

BLOCK = 4096
NUM_WARPS = 8

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@kernel
def block_counts_kernel(words, word_offsets, numels, chunk_table, n_chunks, counts, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_table + chunk)
    start = tl.load(chunk_table + n_chunks + chunk)
    length = tile_length(start, tl.load(numels + tensor), BLOCK)
    tile_words = load_words(words + tl.load(word_offsets + tensor) + start // 32, length, BLOCK // 32)
    tl.store(counts + chunk, tl.sum(popcount(tile_words), axis=0).to(tl.int64))


def block_counts(
    words: Tensor, word_offsets: Sequence[int], numels: Sequence[int], *, block: int = PACK_BLOCK
) -> Tensor:
    device = words.device
    with on_device(device):
        work = chunks(numels, block, device)
        counts = torch.empty(work.count, dtype=torch.int64, device=device)
        if work.count:
            block_counts_kernel[(work.count,)](
                words,
                int64_table(word_offsets, device),
                int64_table(numels, device),
                work.table,
                work.count,
                counts,
                BLOCK=block,
                num_warps=4,
            )
    return counts


@kernel
def move_kernel(dense, packed, words, inclusive, numel, count, UNPACK: tl.constexpr, BLOCK: tl.constexpr):
    """dense -> packed, or packed -> dense. ``inclusive``: set bits up to the end of each tile."""
    tile = tl.program_id(0)
    start = tile.to(tl.int64) * BLOCK
    length = tile_length(start, numel, BLOCK)
    tile_words = load_words(words + start // 32, length, BLOCK // 32)
    bits = tile_bits(tile_words)
    before = tl.load(inclusive + tile) - tl.sum(popcount(tile_words), axis=0)
    rank = before + exclusive_ranks(tile_words)
    offsets = tile_offsets(BLOCK)
    # A wrong count must not reach past the packed tensor.
    taken = (bits != 0) & (rank < count)
    if UNPACK:
        values = tl.load(packed + rank, mask=taken, other=0)
        tl.store(dense + start + offsets, values, mask=offsets < length)
    else:
        values = tl.load(dense + start + offsets, mask=taken)
        tl.store(packed + rank, values, mask=taken)


def _move(dense: Tensor, packed: Tensor, words: Tensor, unpack: bool, block: int) -> None:
    device, numel = words.device, dense.numel()
    if numel == 0:
        return
    integer = _INTEGERS[dense.element_size()]
    with on_device(device):
        inclusive = block_counts(words, (0,), (numel,), block=block).cumsum(0)
        move_kernel[(inclusive.numel(),)](
            dense.view(-1).view(integer),
            packed.view(integer),
            words,
            inclusive,
            numel,
            packed.numel(),
            UNPACK=unpack,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def pack(dense: Tensor, words: Tensor, count: int, *, block: int = BLOCK) -> Tensor:
    """Like the reference, but does not check that ``count`` is the number of set bits: that would synchronise."""
    packed = dense.new_empty((count,))
    _move(dense, packed, words, False, block)
    return packed


def unpack(packed: Tensor, words: Tensor, numel: int, *, block: int = BLOCK) -> Tensor:
    dense = packed.new_empty((numel,))
    _move(dense, packed, words, True, block)
    return dense
