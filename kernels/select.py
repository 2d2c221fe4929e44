"""radix_histogram, threshold_mask and select: exact selection of the largest magnitudes over all tensors together.

Two ways to the same bits, neither of which ever waits for the device:

* composition: three histograms of the keys (11, 10 and 10 bits), then ties counted and words written. Five reads.
* sampled (``sampled_select.py``), for many entries: one read, with the composition enqueued behind it for the rows that
  the sample missed. Its programs return at once if a device flag says that they are not needed.

Fixed configurations. Tiles of 4,096 with 8 warps hold 16 keys a thread. The histogram is bound by its shared-memory
atomics, so a bounded number of programs walk the tiles, and each adds its histogram to global memory only once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.layout import ALL_TIES, INF_KEY, RADIX_BITS, radix_shift, word_offsets
from .radix import digit_counts, pick
from .sampled_select import SAMPLING, Sampling, sampled_masks
from .tables import Chunks, chunks, groups, int64_table, numels_of, on_device, pointers
from .tiles import FLOAT_TYPES, exclusive_ranks, kernel, popcount, ranked_keys, store_words, tile_length, words_of

BLOCK = 4096
NUM_WARPS = 8
MAX_PROGRAMS = 2048
"""Programs of a kernel that walks over tiles: enough to fill a GPU several times over."""

_INF_KEY = tl.constexpr(INF_KEY)
_ALL_TIES = tl.constexpr(ALL_TIES)


class Scores:
    """Tables of the scores: addresses, sizes, word offsets, and for each dtype the chunks of its tensors.

    With ``relative_to`` and ``damping`` their quotients are ranked.
    """

    def __init__(
        self,
        scores: Sequence[Tensor],
        device: torch.device,
        block: int,
        relative_to: Sequence[Tensor] | None = None,
        damping: Tensor | None = None,
    ):
        self.device, self.block = device, block
        self.sizes = numels_of(scores)
        self.offsets = word_offsets(self.sizes)
        self.words = self.offsets[-1]
        self.chunks = sum(-(-numel // block) for numel in self.sizes)
        self.relative = relative_to is not None
        addresses = pointers(scores, device)
        # Without quotients any address serves: it is not read.
        others = addresses if relative_to is None else pointers(relative_to, device)
        self.addresses, self.others = addresses.table, others.table
        self.aligned = addresses.aligned and others.aligned
        self.numels = int64_table(self.sizes, device)
        self.damping = self.numels if damping is None or not scores else damping
        self.word_offsets = int64_table(self.offsets, device)
        self.groups: list[tuple[tl.dtype, Chunks, tuple[int, ...] | None]] = []
        for dtype, members in groups([s.dtype for s in scores]) if scores else ():
            work = chunks(self.sizes, block, device, members)
            if work.count:
                self.groups.append((FLOAT_TYPES[dtype], work, members))

    def launch(self, function, rows: int, programs: int, *arguments, **options) -> None:
        """Launches ``function`` over all (chunk, row), by at most ``programs`` programs, once for each dtype."""
        for dtype, work, _ in self.groups:
            tiles = work.count * rows
            if tiles:
                function[(min(tiles, programs),)](
                    self.addresses,
                    self.others,
                    self.damping,
                    self.numels,
                    self.word_offsets,
                    work.table,
                    work.count,
                    rows,
                    *arguments,
                    RELATIVE=self.relative,
                    DTYPE=dtype,
                    ALIGNED=self.aligned,
                    BLOCK=self.block,
                    num_warps=NUM_WARPS,
                    **options,
                )


@triton.jit
def needed(flags, row, FLAGGED: tl.constexpr):
    """Whether a row needs work: always without flags, otherwise if its flag is set."""
    return tl.load(flags + row) != 0 if FLAGGED else row >= 0


@kernel
def histogram_kernel(
    addresses,
    others,
    damping,
    numels,
    word_offsets,
    chunk_table,
    n_chunks,
    rows,
    prefixes,
    histogram,
    ranks,
    next_ranks,
    previous,
    next_prefixes,
    flags,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    PREVIOUS_BITS: tl.constexpr,
    HISTOGRAM_STRIDE: tl.constexpr,
    FLAGGED: tl.constexpr,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts digits of the keys that begin with the row's prefix.

    PREVIOUS_BITS > 0: the prefix has yet to grow by the digit that the previous level's histogram picks. Every program
    finds that digit for itself, which saves a launch.
    """
    row = tl.program_id(0) % rows
    if needed(flags, row, FLAGGED):
        prefix = tl.load(prefixes + row).to(tl.int64)
        if PREVIOUS_BITS > 0:
            digit, rest = pick(previous + row.to(tl.int64) * HISTOGRAM_STRIDE, tl.load(ranks + row), PREVIOUS_BITS)
            prefix = (prefix << PREVIOUS_BITS) | digit
            if tl.program_id(0) < rows:
                tl.store(next_prefixes + row, prefix)
                tl.store(next_ranks + row, rest)
        counts = tl.zeros((1 << BITS,), tl.int32)
        # Programs of a row stay with it: their stride over (chunk, row) is a multiple of the rows.
        for chunk in range(tl.program_id(0) // rows, n_chunks, tl.num_programs(0) // rows):
            tensor = tl.load(chunk_table + chunk)
            start = tl.load(chunk_table + n_chunks + chunk)
            keys = ranked_keys(
                addresses, others, damping, tensor, start, tl.load(numels + tensor), RELATIVE, DTYPE, ALIGNED, BLOCK
            )
            counted = (keys > 0) & (keys <= _INF_KEY)
            if SHIFT + BITS < 31:
                counted = counted & ((keys >> (SHIFT + BITS)) == prefix.to(tl.int32))
            counts += digit_counts(keys, counted, SHIFT, BITS, BLOCK)
        bins = tl.arange(0, 1 << BITS)
        target = histogram + row.to(tl.int64) * HISTOGRAM_STRIDE + bins
        tl.atomic_add(target, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


def _programs(rows: int) -> int:
    """Programs of the histogram: a multiple of the rows, see the kernel."""
    return max(MAX_PROGRAMS // rows, 1) * rows


def radix_histogram(
    scores: Sequence[Tensor],
    prefixes: Tensor,
    level: int,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
    *,
    block: int = BLOCK,
) -> Tensor:
    device, rows, bits = prefixes.device, prefixes.shape[0], RADIX_BITS[level]
    with on_device(device):
        histogram = torch.zeros((rows, 1 << bits), dtype=torch.int64, device=device)
        if rows:
            Scores(scores, device, block, relative_to, damping).launch(
                histogram_kernel,
                rows,
                _programs(rows),
                prefixes,
                histogram,
                *[histogram] * 5,
                SHIFT=radix_shift(level),
                BITS=bits,
                PREVIOUS_BITS=0,
                HISTOGRAM_STRIDE=1 << bits,
                FLAGGED=False,
            )
    return histogram


@kernel
def threshold_kernel(
    histogram,
    prefixes,
    ranks,
    ks,
    keys,
    tie_limits,
    smallest,
    counts,
    flags,
    TIES_ALL: tl.constexpr,
    HISTOGRAM_STRIDE: tl.constexpr,
    LEVEL_0_BITS: tl.constexpr,
    LEVEL_2_START: tl.constexpr,
    LEVEL_2_BITS: tl.constexpr,
    FLAGGED: tl.constexpr,
):
    """The k-th largest key and how many entries of that key are to be kept, from the histograms of all levels."""
    row = tl.program_id(0)
    if needed(flags, row, FLAGGED):
        own = histogram + row.to(tl.int64) * HISTOGRAM_STRIDE
        digit, rest = pick(own + LEVEL_2_START, tl.load(ranks + row), LEVEL_2_BITS)
        key = (tl.load(prefixes + row) << LEVEL_2_BITS) | digit
        total = tl.sum(tl.load(own + tl.arange(0, 1 << LEVEL_0_BITS)), axis=0)
        everything = total < tl.load(ks + row)
        key = tl.where(everything, 1, tl.minimum(tl.maximum(key, 1), _INF_KEY))
        limit = rest
        if TIES_ALL:
            limit = tl.full((), _ALL_TIES, tl.int64)
        tl.store(keys + row, key.to(tl.int32))
        tl.store(tie_limits + row, tl.where(everything, _ALL_TIES, limit))
        # Clears the results of a sample that missed.
        tl.store(smallest + row, _INF_KEY)
        tl.store(counts + row, tl.zeros((), tl.int64))


@kernel
def ties_kernel(
    addresses,
    others,
    damping,
    numels,
    word_offsets,
    chunk_table,
    n_chunks,
    rows,
    keys,
    tie_limits,
    flags,
    ties,
    all_chunks,
    FLAGGED: tl.constexpr,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Entries equal to the row's key in each chunk; not needed if all of them are kept."""
    for tile in range(tl.program_id(0), n_chunks * rows, tl.num_programs(0)):
        row = tile % rows
        if needed(flags, row, FLAGGED) & (tl.load(tie_limits + row) != _ALL_TIES):
            chunk = tile // rows
            tensor = tl.load(chunk_table + chunk)
            start = tl.load(chunk_table + n_chunks + chunk)
            rank = tl.load(chunk_table + 2 * n_chunks.to(tl.int64) + chunk)
            loaded = ranked_keys(
                addresses, others, damping, tensor, start, tl.load(numels + tensor), RELATIVE, DTYPE, ALIGNED, BLOCK
            )
            equal = tl.sum(tl.sum((loaded == tl.load(keys + row)).to(tl.int32), axis=1), axis=0)
            tl.store(ties + row.to(tl.int64) * all_chunks + rank, equal.to(tl.int64))


@kernel
def words_kernel(
    addresses,
    others,
    damping,
    numels,
    word_offsets,
    chunk_table,
    n_chunks,
    rows,
    keys,
    tie_limits,
    flags,
    ties,
    all_chunks,
    words,
    width,
    smallest,
    counts,
    nan_count,
    COUNT_NAN: tl.constexpr,
    FLAGGED: tl.constexpr,
    RELATIVE: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Words, counts and smallest kept key. ``ties`` [rows, all_chunks] has ties up to the end of each chunk."""
    for tile in range(tl.program_id(0), n_chunks * rows, tl.num_programs(0)):
        row = tile % rows
        if needed(flags, row, FLAGGED):
            chunk = tile // rows
            tensor = tl.load(chunk_table + chunk)
            start = tl.load(chunk_table + n_chunks + chunk)
            rank = tl.load(chunk_table + 2 * n_chunks.to(tl.int64) + chunk)
            numel = tl.load(numels + tensor)
            loaded = ranked_keys(addresses, others, damping, tensor, start, numel, RELATIVE, DTYPE, ALIGNED, BLOCK)
            key = tl.load(keys + row)
            limit = tl.load(tie_limits + row)
            tie = loaded == key
            kept = ((loaded > key) & (loaded <= _INF_KEY)) | tie
            if limit != _ALL_TIES:
                up_to_here = tl.load(ties + row.to(tl.int64) * all_chunks + rank)
                if up_to_here > limit:
                    tie_words = words_of(tie)
                    before = up_to_here - tl.sum(popcount(tie_words), axis=0)
                    # Clamped into int32, in which ranks within a tile are.
                    allowed = tl.minimum(tl.maximum(limit - before, 0), BLOCK).to(tl.int32)
                    kept = kept & ((loaded != key) | (exclusive_ranks(tie_words) < allowed))
            target = words + row.to(tl.int64) * width + tl.load(word_offsets + tensor) + start // 32
            tile_words = words_of(kept)
            store_words(target, tile_words, tile_length(start, numel, BLOCK), BLOCK // 32)
            count = tl.sum(popcount(tile_words), axis=0)
            if count > 0:
                tl.atomic_add(counts + row, count.to(tl.int64), sem="relaxed")
                least = tl.min(tl.min(tl.where(kept, loaded, _INF_KEY), axis=1), axis=0)
                tl.atomic_min(smallest + row, least, sem="relaxed")
            if COUNT_NAN:
                nans = tl.sum(tl.sum((loaded > _INF_KEY).to(tl.int32), axis=1), axis=0)
                if (nans > 0) & (row == 0):
                    tl.atomic_add(nan_count, nans.to(tl.int64), sem="relaxed")


class Masks:
    """What threshold_mask and select return, before the smallest keys become floats."""

    def __init__(self, tables: Scores, rows: int):
        device = tables.device
        self.words = torch.empty((rows, tables.words), dtype=torch.int32, device=device)
        self.smallest = torch.full((rows,), INF_KEY, dtype=torch.int32, device=device)
        totals = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.counts, self.nan_count = totals[:rows], totals[rows]

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.words, self.smallest.view(torch.float32), self.counts.clone(), self.nan_count.clone()


def write_masks(tables: Scores, masks: Masks, keys: Tensor, tie_limits: Tensor, flags: Tensor | None) -> None:
    """The rows' words from their keys and tie limits; of all rows without ``flags``, else of those flagged."""
    rows = keys.shape[0]
    if tables.chunks == 0:
        return
    flagged = flags is not None
    unused = flags if flagged else keys
    ties = torch.zeros((rows, tables.chunks), dtype=torch.int64, device=tables.device)
    tables.launch(ties_kernel, rows, MAX_PROGRAMS, keys, tie_limits, unused, ties, tables.chunks, FLAGGED=flagged)
    tables.launch(
        words_kernel,
        rows,
        MAX_PROGRAMS,
        keys,
        tie_limits,
        unused,
        ties.cumsum(1),
        tables.chunks,
        masks.words,
        tables.words,
        masks.smallest,
        masks.counts,
        masks.nan_count,
        # The sampled way has counted NaN in its own pass.
        COUNT_NAN=not flagged,
        FLAGGED=flagged,
    )


def threshold_mask(
    scores: Sequence[Tensor],
    keys: Tensor,
    tie_limits: Tensor,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
    *,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = keys.device
    if keys.shape[0] == 0:
        # NaN are counted even so.
        words, thresholds, counts, nan_count = threshold_mask(
            scores, keys.new_full((1,), INF_KEY), tie_limits.new_zeros((1,)), relative_to, damping, block=block
        )
        return words[:0], thresholds[:0], counts[:0], nan_count
    with on_device(device):
        tables = Scores(scores, device, block, relative_to, damping)
        masks = Masks(tables, keys.shape[0])
        write_masks(tables, masks, keys, tie_limits, None)
        return masks.result()


def compose(tables: Scores, masks: Masks, ks: Tensor, ties_all: bool, flags: Tensor | None) -> None:
    """Selection by histograms; of all rows without ``flags``, else of those flagged."""
    rows, device = ks.shape[0], ks.device
    starts = [sum(1 << bits for bits in RADIX_BITS[:level]) for level in range(len(RADIX_BITS) + 1)]
    stride = starts[-1]
    histogram = torch.zeros((rows, stride), dtype=torch.int64, device=device)
    # Before each level: the prefix, and the rank of the wanted entry among those that have it.
    prefixes = torch.zeros((len(RADIX_BITS), rows), dtype=torch.int64, device=device)
    ranks = torch.empty((len(RADIX_BITS), rows), dtype=torch.int64, device=device)
    flagged = flags is not None
    unused = flags if flagged else ks
    for level, bits in enumerate(RADIX_BITS):
        before = max(level - 1, 0)
        tables.launch(
            histogram_kernel,
            rows,
            _programs(rows),
            prefixes[before],
            histogram[0, starts[level] :],
            ks if before == 0 else ranks[before],
            ranks[level],
            histogram[0, starts[before] :],
            prefixes[level],
            unused,
            SHIFT=radix_shift(level),
            BITS=bits,
            PREVIOUS_BITS=RADIX_BITS[level - 1] if level else 0,
            HISTOGRAM_STRIDE=stride,
            FLAGGED=flagged,
        )
    keys = torch.empty(rows, dtype=torch.int32, device=device)
    tie_limits = torch.empty(rows, dtype=torch.int64, device=device)
    threshold_kernel[(rows,)](
        histogram,
        prefixes[2],
        ranks[2],
        ks,
        keys,
        tie_limits,
        masks.smallest,
        masks.counts,
        unused,
        TIES_ALL=ties_all,
        HISTOGRAM_STRIDE=stride,
        LEVEL_0_BITS=RADIX_BITS[0],
        LEVEL_2_START=starts[2],
        LEVEL_2_BITS=RADIX_BITS[2],
        FLAGGED=flagged,
        num_warps=4,
    )
    write_masks(tables, masks, keys, tie_limits, flags)


def select(
    scores: Sequence[Tensor],
    ks: Tensor,
    ties_all: bool = False,
    relative_to: Sequence[Tensor] | None = None,
    damping: Tensor | None = None,
    *,
    block: int = BLOCK,
    sampling: Sampling = SAMPLING,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, rows = ks.device, ks.shape[0]
    if rows == 0:
        return threshold_mask(scores, ks.to(torch.int32), ks, relative_to, damping, block=block)
    with on_device(device):
        tables = Scores(scores, device, block, relative_to, damping)
        masks = Masks(tables, rows)
        if tables.chunks:
            flags = None
            if sampling.applies(sum(tables.sizes), tables.words):
                flags = sampled_masks(tables, masks, ks, ties_all, sampling)
            compose(tables, masks, ks, ties_all, flags)
        return masks.result()
