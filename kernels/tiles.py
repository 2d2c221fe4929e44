"""Shared by the kernels: tiles of entries, mask words, float formats, 32-bit hashing.

A tile is [BLOCK / 32, 32]: one row is one mask word's entries. Its entries' offsets fit int32; the tile's start is
added to the address as int64.
"""

import torch
import triton
import triton.language as tl

FLOAT_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

_SMALLEST_NORMAL = tl.constexpr(2.0**-126)

kernel = triton.jit(
    do_not_specialize=(
        "n_chunks",
        "rows",
        "all_chunks",
        "width",
        "numel",
        "count",
        "bias_rows",
        "places",
        "samples",
        "n_tensors",
        "group",
        "capacity",
    )
)
"""``triton.jit`` for what is launched: compiled once, not again for sizes that are 1 or multiples of 16."""


@triton.jit
def tile_offsets(BLOCK: tl.constexpr):
    """int32 [BLOCK / 32, 32]: offsets of a tile's entries."""
    return tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def tile_length(start, numel, BLOCK: tl.constexpr):
    """int32: entries of the tile that the tensor has."""
    return tl.minimum(numel - start, BLOCK).to(tl.int32)


@triton.jit
def pointer_at(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to entry ``start`` (a multiple of 32) of the tensor at ``address``.

    bfloat16 is read and written as int16 (see ``widen`` and ``narrow``). ALIGNED promises that the address is a
    multiple of 16 bytes, and makes each thread's entries consecutive (vector accesses). Without it the 32 lanes of a
    warp take consecutive entries, which suits accesses predicated entry by entry: a row is one mask word.
    """
    if DTYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.int16)) + start
    else:
        pointer = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def widen(raw, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Values loaded through ``pointer_at``, in the compute type."""
    if DTYPE == tl.bfloat16:
        values = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        values = raw.to(COMPUTE)
    return values


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """The inverse of ``widen``: rounded to nearest, ties to even."""
    if DTYPE == tl.bfloat16:
        raw = values.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) >> 16
        result = tl.where(values == values, rounded, 0x7FC0).to(tl.int16)
    else:
        result = values.to(DTYPE)
    return result


@triton.jit
def keys_of(raw, DTYPE: tl.constexpr):
    """int32 selection keys: the float32 bits without the sign."""
    return widen(raw, DTYPE, tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quotient_keys(raw, others, damping, DTYPE: tl.constexpr):
    """Keys of |score| / max(|other| + damping, smallest normal number), rounded to nearest: see ops/reference.py."""
    denominators = tl.abs(widen(others, DTYPE, tl.float32)) + damping
    denominators = tl.where(denominators < _SMALLEST_NORMAL, _SMALLEST_NORMAL, denominators)
    return tl.div_rn(tl.abs(widen(raw, DTYPE, tl.float32)), denominators).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def ranked_keys(
    addresses,
    others,
    damping,
    tensor,
    start,
    numel,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Selection keys of a tile: of the scores, or of their quotients; 0, which is never kept, past the tensor's end."""
    raw = load_raw(tl.load(addresses + tensor), start, numel, DTYPE, ALIGNED, BLOCK)
    if RELATIVE:
        other = load_raw(tl.load(others + tensor), start, numel, DTYPE, ALIGNED, BLOCK)
        keys = quotient_keys(raw, other, tl.load(damping + tensor), DTYPE)
    else:
        keys = keys_of(raw, DTYPE)
    return keys


@triton.jit
def load_raw(address, start, numel, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Entries of a tile as they are stored; 0 past the end of the tensor."""
    pointer = pointer_at(address, start, DTYPE, ALIGNED)
    offsets = tile_offsets(BLOCK)
    # A whole tile needs no mask, and only without one are the loads vectors.
    if start + BLOCK <= numel:
        raw = tl.load(pointer + offsets)
    else:
        raw = tl.load(pointer + offsets, mask=offsets < tile_length(start, numel, BLOCK), other=0)
    return raw


@triton.jit
def words_of(bits):
    """int32 [rows]: a tile of booleans as mask words."""
    # Distinct bits: their sum, which wraps at bit 31, is their union.
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def store_words(pointer, words, length, ROWS: tl.constexpr):
    """Writes the mask words of the first ``length`` entries."""
    rows = tl.arange(0, ROWS)
    tl.store(pointer + rows, words, mask=rows * 32 < length)


@triton.jit
def load_words(pointer, length, ROWS: tl.constexpr):
    """int32 [ROWS]: mask words of the first ``length`` entries, with 0 for every bit past them."""
    rows = tl.arange(0, ROWS)
    words = tl.load(pointer + rows, mask=rows * 32 < length, other=0)
    tail = length - rows * 32
    partial = (1 << tl.minimum(tl.maximum(tail, 0), 31)) - 1
    return tl.where(tail >= 32, words, words & partial)


@triton.jit
def popcount(words):
    """int32: set bits of each int32 word. Written as the idiom that the compiler knows: one instruction on a GPU."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def tile_bits(words):
    """int32 [rows, 32] of 0 and 1 from int32 words [rows]."""
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def exclusive_ranks(words):
    """int32 [rows, 32]: set bits before each entry of the tile, in row-major order."""
    per_word = popcount(words)
    before_word = tl.cumsum(per_word, axis=0) - per_word
    lower = (1 << tl.arange(0, 32)) - 1
    return before_word[:, None] + popcount(words[:, None] & lower[None, :])


@triton.jit
def mix(x):
    """The finaliser of MurmurHash3 on uint32."""
    x = x ^ (x >> 16)
    x = multiply_u32(x, 0x85EBCA6B)
    x = x ^ (x >> 13)
    x = multiply_u32(x, 0xC2B2AE35)
    return x ^ (x >> 16)


@triton.jit
def multiply_u32(x, FACTOR: tl.constexpr):
    # The low half of the 64-bit product: a 32-bit multiplication on the hardware.
    return ((x.to(tl.uint64) * FACTOR) & 0xFFFFFFFF).to(tl.uint32)
