"""Selection with one read of the scores: a sample brackets the threshold, one pass marks entries surely above it.

Entries are ordered by *rank keys*, int64: the magnitude's key above, the entry's place in the mask (32 * word + bit,
inverted) below. They are distinct, so that the k largest are exactly the mask with the lowest-index rule for ties, and
a bracket is narrow whatever the data: a constant tensor is no harder than a random one.

1. One entry of each of ``samples`` equal strata of the mask's places is drawn; the samples are sorted.
2. The bracket around rank k is +- ``sigmas`` standard deviations of the sample's rank, plus ``spare`` for small k.
   Strata only lower the variance below the binomial one.
3. One pass writes the words of the entries above the bracket and gathers those inside it, the candidates, into a
   buffer. A tile with candidates reserves their places with one atomic; their order does not matter.
4. The candidates' exact threshold is found by radix passes over the buffer, and their bits are added.
5. A row is flagged if its bracket missed or its buffer was too small. The composition, enqueued behind this, redoes
   the flagged rows and returns at once for all others.

The drawn entries do not affect the result, only whether the composition is needed.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import INF_KEY, RADIX_BITS
from .radix import digit_counts, pick
from .tables import int64_table
from .tiles import (
    exclusive_ranks,
    kernel,
    keys_of,
    mix,
    pointer_at,
    popcount,
    quotient_keys,
    ranked_keys,
    store_words,
    tile_bits,
    tile_length,
    tile_offsets,
    words_of,
)

_BLOCK = 1024
_CANDIDATE_PROGRAMS = 512
_INF_KEY = tl.constexpr(INF_KEY)
# Rank keys of entries that can be kept are at least this one: key 1 at the very last place.
_BOTTOM = tl.constexpr(1 << 32)
_LAST_PLACE = tl.constexpr((1 << 32) - 1)

# Bits of a rank key that each radix pass resolves: the magnitude's 31, then the place's 32.
_LEVEL_BITS = (*RADIX_BITS, 11, 11, 10)
_MAGNITUDE_LEVELS = len(RADIX_BITS)


@dataclass(frozen=True)
class Sampling:
    """When to sample and how much.

    131,072 samples at five standard deviations bracket at most 1.4 % of the entries, which need a buffer of 0.14 bytes
    an entry, and miss once in two million selections. Below 4 million entries the scores stay in a GPU's second-level
    cache and the composition is as fast.
    """

    samples: int = 1 << 17
    sigmas: float = 5.0
    spare: float = 8.0
    from_entries: int = 1 << 22

    def applies(self, entries: int, words: int) -> bool:
        # A place and a count of entries must fit 32 bits.
        return entries >= self.from_entries and words * 32 < 1 << 32

    def capacity(self, words: int) -> int:
        """Candidates that the buffer holds: the widest bracket, and a quarter more for chance."""
        places = words * 32
        width = self.sigmas * math.sqrt(self.samples) + 2 * self.spare + 2
        return min(places, int(1.25 * width * places / self.samples) + 1024)


SAMPLING = Sampling()


@triton.jit
def rank_keys(keys, places):
    return (keys.to(tl.int64) << 32) | (_LAST_PLACE - places)


@kernel
def sample_kernel(
    addresses,
    others,
    damping,
    numels,
    word_offsets,
    tensor_groups,
    sample,
    places,
    samples,
    n_tensors,
    group,
    SEARCH_STEPS: tl.constexpr,
    GROUPED: tl.constexpr,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rank key of a random entry of each stratum; 0 if the place is padding or the entry can never be kept."""
    stratum = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    begin = stratum * places // samples
    size = (stratum + 1) * places // samples - begin
    place = begin + ((mix(stratum.to(tl.uint32)).to(tl.int64) * size) >> 32)
    valid = (stratum < samples) & (size > 0)
    # The last tensor that begins at or before the place.
    tensor = tl.zeros((BLOCK,), tl.int32)
    end = tl.zeros((BLOCK,), tl.int32) + n_tensors
    for _ in range(SEARCH_STEPS):
        middle = (tensor + end) // 2
        after = tl.load(word_offsets + middle) * 32 <= place
        tensor = tl.where(after, middle, tensor)
        end = tl.where(after, end, middle)
    entry = place - tl.load(word_offsets + tensor) * 32
    mine = stratum < samples
    if GROUPED:
        mine = mine & (tl.load(tensor_groups + tensor) == group)
    valid = valid & mine & (entry < tl.load(numels + tensor))
    raw = tl.load(pointer_at(tl.load(addresses + tensor), entry, DTYPE, False), mask=valid, other=0)
    if RELATIVE:
        other = tl.load(pointer_at(tl.load(others + tensor), entry, DTYPE, False), mask=valid, other=0)
        keys = quotient_keys(raw, other, tl.load(damping + tensor), DTYPE)
    else:
        keys = keys_of(raw, DTYPE)
    drawn = tl.where((keys > 0) & (keys <= _INF_KEY), rank_keys(keys, place), 0)
    tl.store(sample + stratum, drawn, mask=mine)


@kernel
def bracket_kernel(ordered, ks, brackets, places, samples, sigmas, spare):
    """brackets [rows, 2]: an entry is a candidate from the first to the second rank key, and surely kept above."""
    row = tl.program_id(0)
    wanted = tl.load(ks + row).to(tl.float64) * samples.to(tl.float64) / places.to(tl.float64)
    variance = tl.maximum(wanted * (1.0 - wanted / samples.to(tl.float64)), 0.0)
    margin = sigmas * tl.sqrt(variance) + spare
    # Samples are in descending order; beyond either end the bracket is open.
    first = tl.floor(wanted - margin).to(tl.int64)
    last = tl.ceil(wanted + margin).to(tl.int64)
    high = tl.load(ordered + tl.minimum(tl.maximum(first, 0), samples - 1))
    high = tl.where(first < 0, (1 << 63) - 1, tl.where(first >= samples, 0, high))
    low = tl.load(ordered + tl.minimum(last, samples - 1))
    low = tl.where(last >= samples, 0, low)
    tl.store(brackets + 2 * row, tl.maximum(low, _BOTTOM))
    tl.store(brackets + 2 * row + 1, tl.maximum(high, _BOTTOM - 1))


@triton.jit
def load_bracket(brackets, row, TIES_ALL: tl.constexpr):
    low = tl.load(brackets + 2 * row)
    high = tl.load(brackets + 2 * row + 1)
    if TIES_ALL:
        # Equal magnitudes stay together, whatever their places.
        low = (low >> 32) << 32
        high = high | _LAST_PLACE
    return low, high


@triton.jit
def entries_to(rank_key, first_place, INCLUSIVE: tl.constexpr, BLOCK: tl.constexpr):
    """int32: how many of a tile's entries have a place before that of a rank key, or at it (INCLUSIVE)."""
    place = (rank_key & _LAST_PLACE) ^ _LAST_PLACE
    if INCLUSIVE:
        place += 1
    return tl.minimum(tl.maximum(place - first_place, 0), BLOCK).to(tl.int32)


@kernel
def mark_kernel(
    addresses,
    others,
    damping,
    numels,
    word_offsets,
    chunk_table,
    n_chunks,
    rows,
    brackets,
    words,
    width,
    candidates,
    capacity,
    tallies,
    nan_count,
    TIES_ALL: tl.constexpr,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The one read: words and number of the entries above the bracket, and the candidates' rank keys."""
    row = tl.program_id(0) % rows
    chunk = tl.program_id(0) // rows
    tensor = tl.load(chunk_table + chunk)
    start = tl.load(chunk_table + n_chunks + chunk)
    numel = tl.load(numels + tensor)
    keys = ranked_keys(addresses, others, damping, tensor, start, numel, RELATIVE, DTYPE, ALIGNED, BLOCK)
    low, high = load_bracket(brackets, row, TIES_ALL)
    first_word = tl.load(word_offsets + tensor) + start // 32
    first_place = first_word * 32
    offsets = tile_offsets(BLOCK)
    # Rank keys are compared in their halves: int32, and half the registers.
    number = keys <= _INF_KEY
    high_key = (high >> 32).to(tl.int32)
    high_cut = entries_to(high, first_place, False, BLOCK)
    above = number & ((keys > high_key) | ((keys == high_key) & (offsets < high_cut)))
    target = words + row.to(tl.int64) * width + first_word
    above_words = words_of(above)
    store_words(target, above_words, tile_length(start, numel, BLOCK), BLOCK // 32)
    low_key = (low >> 32).to(tl.int32)
    low_cut = entries_to(low, first_place, True, BLOCK)
    not_below = (keys > low_key) | ((keys == low_key) & (offsets < low_cut))
    inside_words = words_of(number & not_below & (above == 0))
    # One atomic for both counts, which at most 2^13 entries of a tile each cannot mix up.
    both = tl.sum(popcount(above_words) << 16 | popcount(inside_words), axis=0)
    sure = (both >> 16).to(tl.int64)
    inside = both & 0xFFFF
    if both > 0:
        first = tl.atomic_add(tallies + row, sure << 32 | inside.to(tl.int64), sem="relaxed") & _LAST_PLACE
        if inside > 0:
            slots = exclusive_ranks(inside_words)
            # Candidates that do not fit are not lost: the count shows it, and the row is redone.
            room = tl.minimum(tl.maximum(capacity - first, 0), BLOCK).to(tl.int32)
            fits = (tile_bits(inside_words) != 0) & (slots < room)
            ranked = rank_keys(keys, first_place + offsets)
            tl.store(candidates + row.to(tl.int64) * capacity + first + slots, ranked, mask=fits)
    nans = tl.sum(tl.sum((keys > _INF_KEY).to(tl.int32), axis=1), axis=0)
    if (nans > 0) & (row == 0):
        tl.atomic_add(nan_count, nans.to(tl.int64), sem="relaxed")


@triton.jit
def tally(tallies, row):
    """(entries above the bracket, candidates) of a row; neither reaches 2^32."""
    both = tl.load(tallies + row)
    return (both >> 32) & _LAST_PLACE, both & _LAST_PLACE


@triton.jit
def descend(ks, tallies, prefixes, ranks, histogram, row, FIRST: tl.constexpr, BITS: tl.constexpr):
    """(prefix, rank) after the level of ``histogram``, from those before it."""
    if FIRST:
        prefix = tl.zeros((), tl.int64)
        sure, _ = tally(tallies, row)
        remaining = tl.load(ks + row) - sure
    else:
        prefix = tl.load(prefixes + row)
        remaining = tl.load(ranks + row)
    digit, rest = pick(histogram, remaining, BITS)
    return (prefix << BITS) | digit, rest


@kernel
def candidate_histogram_kernel(
    candidates,
    capacity,
    tallies,
    ks,
    prefixes,
    ranks,
    next_prefixes,
    next_ranks,
    previous,
    histogram,
    rows,
    FIRST: tl.constexpr,
    PREVIOUS_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts digits of the candidates that begin with the row's prefix, which first grows by the previous digit."""
    row = tl.program_id(0) % rows
    own = row.to(tl.int64)
    prefix = tl.zeros((), tl.int64)
    if PREVIOUS_BITS > 0:
        prefix, rest = descend(ks, tallies, prefixes, ranks, previous + own * STRIDE, row, FIRST, PREVIOUS_BITS)
        if tl.program_id(0) < rows:
            tl.store(next_prefixes + row, prefix)
            tl.store(next_ranks + row, rest)
    _, gathered = tally(tallies, row)
    n = tl.minimum(gathered, capacity)
    counts = tl.zeros((1 << BITS,), tl.int32)
    programs = tl.num_programs(0) // rows
    for part in range(tl.program_id(0) // rows, tl.cdiv(n, BLOCK), programs):
        index = part * BLOCK + tl.arange(0, BLOCK)
        ranked = tl.load(candidates + own * capacity + index, mask=index < n, other=0)
        counted = index < n
        if PREVIOUS_BITS > 0:
            counted = counted & ((ranked >> (SHIFT + BITS)) == prefix)
        counts += digit_counts(ranked, counted, SHIFT, BITS, BLOCK)
    bins = tl.arange(0, 1 << BITS)
    tl.atomic_add(histogram + own * STRIDE + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@kernel
def patch_kernel(
    candidates,
    capacity,
    tallies,
    ks,
    brackets,
    prefixes,
    ranks,
    previous,
    words,
    width,
    smallest,
    counts,
    flags,
    rows,
    TIES_ALL: tl.constexpr,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the candidates' bits and counts, or flags the row."""
    row = tl.program_id(0) % rows
    own = row.to(tl.int64)
    prefix, _ = descend(ks, tallies, prefixes, ranks, previous + own * STRIDE, row, False, BITS)
    threshold = prefix << SHIFT
    k = tl.load(ks + row)
    n_sure, n = tally(tallies, row)
    low, _ = load_bracket(brackets, row, TIES_ALL)
    # Fewer than k are fine if the bracket reaches to the last entry that can be kept. The smallest kept entry has to be
    # a candidate: the others' magnitudes were not looked at.
    missed = (n_sure >= k) | (n > capacity) | ((n_sure + n < k) & (low > _BOTTOM)) | ((n == 0) & (n_sure > 0))
    if tl.program_id(0) < rows:
        tl.store(flags + row, missed.to(tl.int32))
        tl.atomic_add(counts + row, n_sure, sem="relaxed")
    if missed == 0:
        programs = tl.num_programs(0) // rows
        for part in range(tl.program_id(0) // rows, tl.cdiv(n, BLOCK), programs):
            index = part * BLOCK + tl.arange(0, BLOCK)
            ranked = tl.load(candidates + own * capacity + index, mask=index < n, other=0)
            kept = (index < n) & (ranked >= threshold)
            place = _LAST_PLACE - (ranked & _LAST_PLACE)
            bit = tl.full((BLOCK,), 1, tl.int32) << (place & 31).to(tl.int32)
            tl.atomic_or(words + own * width + (place >> 5), bit, mask=kept, sem="relaxed")
            count = tl.sum(kept.to(tl.int32), axis=0)
            if count > 0:
                tl.atomic_add(counts + row, count.to(tl.int64), sem="relaxed")
                least = tl.min(tl.where(kept, (ranked >> 32).to(tl.int32), _INF_KEY), axis=0)
                tl.atomic_min(smallest + row, least, sem="relaxed")


def _draw(tables, sampling: Sampling) -> Tensor:
    """Rank keys of the samples, in descending order."""
    device, n_tensors = tables.device, len(tables.sizes)
    sample = torch.empty(sampling.samples, dtype=torch.int64, device=device)
    group_of = [0] * n_tensors
    for number, (_, _, members) in enumerate(tables.groups):
        for index in members or ():
            group_of[index] = number
    for number, (dtype, _, members) in enumerate(tables.groups):
        sample_kernel[(triton.cdiv(sampling.samples, _BLOCK),)](
            tables.addresses,
            tables.others,
            tables.damping,
            tables.numels,
            tables.word_offsets,
            int64_table(group_of, device),
            sample,
            tables.words * 32,
            sampling.samples,
            n_tensors,
            number,
            SEARCH_STEPS=n_tensors.bit_length(),
            GROUPED=members is not None,
            RELATIVE=tables.relative,
            DTYPE=dtype,
            BLOCK=_BLOCK,
            # Division takes registers.
            num_warps=8 if tables.relative else 4,
        )
    return sample.sort(descending=True).values


def sampled_masks(tables, masks, ks: Tensor, ties_all: bool, sampling: Sampling) -> Tensor:
    """Fill ``masks`` and return flags, int32 [rows]: not 0 if a row has to be redone.

    tables, masks: ``Scores`` and fresh ``Masks`` of ``select.py``.
    """
    rows, device = ks.shape[0], ks.device
    brackets = torch.empty((rows, 2), dtype=torch.int64, device=device)
    bracket_kernel[(rows,)](
        _draw(tables, sampling),
        ks,
        brackets,
        tables.words * 32,
        sampling.samples,
        sampling.sigmas,
        sampling.spare,
        num_warps=1,
    )
    capacity = sampling.capacity(tables.words)
    candidates = torch.empty((rows, capacity), dtype=torch.int64, device=device)
    tallies = torch.zeros(rows, dtype=torch.int64, device=device)
    tables.launch(
        mark_kernel,
        rows,
        tables.chunks * rows,
        brackets,
        masks.words,
        tables.words,
        candidates,
        capacity,
        tallies,
        masks.nan_count,
        TIES_ALL=ties_all,
    )
    # If all ties are kept, the place of an entry does not matter.
    levels = _LEVEL_BITS[:_MAGNITUDE_LEVELS] if ties_all else _LEVEL_BITS
    starts = [sum(1 << bits for bits in levels[:level]) for level in range(len(levels) + 1)]
    shifts = [sum(_LEVEL_BITS[level + 1 :]) for level in range(len(levels))]
    histogram = torch.zeros((rows, starts[-1]), dtype=torch.int64, device=device)
    # Before each level: the prefix of the wanted candidate, and its rank among the candidates with that prefix.
    prefixes, ranks = torch.zeros((2, len(levels), rows), dtype=torch.int64, device=device)
    programs = max(min(_CANDIDATE_PROGRAMS, triton.cdiv(capacity, _BLOCK)), 1) * rows
    for level, bits in enumerate(levels):
        before = max(level - 1, 0)
        candidate_histogram_kernel[(programs,)](
            candidates,
            capacity,
            tallies,
            ks,
            prefixes[before],
            ranks[before],
            prefixes[level],
            ranks[level],
            histogram[0, starts[before] :],
            histogram[0, starts[level] :],
            rows,
            FIRST=level == 1,
            PREVIOUS_BITS=levels[level - 1] if level else 0,
            SHIFT=shifts[level],
            BITS=bits,
            STRIDE=starts[-1],
            BLOCK=_BLOCK,
            num_warps=4,
        )
    flags = torch.empty(rows, dtype=torch.int32, device=device)
    patch_kernel[(programs,)](
        candidates,
        capacity,
        tallies,
        ks,
        brackets,
        prefixes[-1],
        ranks[-1],
        histogram[0, starts[-2] :],
        masks.words,
        tables.words,
        masks.smallest,
        masks.counts,
        flags,
        rows,
        TIES_ALL=ties_all,
        BITS=levels[-1],
        SHIFT=shifts[-1],
        STRIDE=starts[-1],
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return flags
