"""Sizes that every back end shares: the memory layout of masks and packed state.

Their only owner in Python; the Triton kernels import this module of the package and no other. In C++
csrc/common/bit_words.h and radix_key.h own them.
"""

from collections.abc import Sequence

WORD_BITS = 32
"""Entries in a mask word: bit ``i`` of word ``w`` is entry ``32 * w + i`` of its tensor."""

PACK_BLOCK = 16384
"""Entries between two recorded offsets into packed state; a multiple of ``WORD_BITS``."""

ZERO_KEY = 0
INF_KEY = 0x7F800000
"""Key of an infinite entry. ``key = float32 bits & 0x7fffffff`` orders magnitudes; larger keys are NaN."""

ALL_TIES = (1 << 63) - 1
"""A limit on the entries of equal magnitude that are kept: none."""

RADIX_BITS = (11, 10, 10)
"""Bits of a 31-bit key that each histogram level resolves, highest first."""

SUM_WINDOWS = 16
"""Ranges of 16 float32 exponents that ``magnitude_sums`` adds up on their own."""

SUM_COLUMNS = 2 * SUM_WINDOWS + 1
"""Columns of the result of ``magnitude_sums``: low and high parts of the windows, and the number of finite entries."""


def radix_shift(level: int) -> int:
    """Bits of the key below those that ``level`` resolves."""
    return sum(RADIX_BITS[level + 1 :])


def num_words(numel: int) -> int:
    """Mask words of a tensor with ``numel`` entries. Every tensor starts on a word."""
    return -(-numel // WORD_BITS)


def word_offsets(numels: Sequence[int]) -> list[int]:
    """First word of each tensor, with the total number of words at the end."""
    offsets = [0]
    for numel in numels:
        offsets.append(offsets[-1] + num_words(numel))
    return offsets


def num_blocks(numel: int) -> int:
    """Blocks of ``PACK_BLOCK`` entries in a tensor of ``numel`` entries."""
    return -(-numel // PACK_BLOCK)
