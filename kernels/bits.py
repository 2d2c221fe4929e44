"""Mask words inside kernels: bit i of word w of a tensor is its entry 32 w + i."""

import triton
import triton.language as tl


@triton.jit
def load_bits(words, entries, valid):
    """0 or 1 for each entry; ``words`` points at the first word of the tensor."""
    word = tl.load(words + (entries >> 5), mask=valid, other=0)
    return (word >> (entries & 31).to(tl.int32)) & 1


@triton.jit
def pack_words(bits, BLOCK: tl.constexpr):
    """int32 [BLOCK // 32] words of BLOCK zeros and ones."""
    lanes = tl.arange(0, 32)
    return tl.sum(tl.reshape(bits.to(tl.int32), (BLOCK // 32, 32)) << lanes[None, :], axis=1)


@triton.jit
def count_bits(words):
    """Set bits of each int32 word."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def salient_before(words, block_start, entry, PACK_BLOCK: tl.constexpr):
    """Salient entries of a tensor from ``block_start`` up to ``entry``; both are multiples of 32, in one pack block."""
    index = tl.arange(0, PACK_BLOCK // 32)
    first = block_start >> 5
    counted = index < ((entry - block_start) >> 5)
    return tl.sum(count_bits(tl.load(words + first + index, mask=counted, other=0)), axis=0)
