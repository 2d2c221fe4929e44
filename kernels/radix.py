"""One level of a radix selection: counting digits, and picking the digit of the wanted entry."""

import triton
import triton.language as tl


@triton.jit
def pick(histogram, remaining, BITS: tl.constexpr):
    """(digit, rest): bin of the ``remaining``-th largest entry, and its rank within that bin."""
    bins = tl.arange(0, 1 << BITS)
    counts = tl.load(histogram + bins)
    at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    digit = tl.maximum(tl.sum((at_least >= remaining).to(tl.int32), axis=0) - 1, 0)
    above = tl.sum(tl.where(bins > digit, counts, 0), axis=0)
    return digit.to(tl.int64), remaining - above


@triton.jit
def digit_counts(keys, counted, SHIFT: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr):
    """int32 [2 ** BITS]: how many of the SIZE keys, of those counted, have each digit."""
    digits = tl.where(counted, (keys >> SHIFT) & ((1 << BITS) - 1), 0)
    digits = tl.reshape(digits.to(tl.int32), (SIZE,))
    others = SIZE - tl.sum(tl.reshape(counted.to(tl.int32), (SIZE,)), axis=0)
    # Entries that do not count were put into bin 0 and are taken out of it.
    bins = tl.arange(0, 1 << BITS)
    return tl.histogram(digits, 1 << BITS) - tl.where(bins == 0, others, 0)
