"""The CUDA selection, run on the host by the emulator, against the reference: no GPU is needed."""

import random

import pytest
import torch

from pecker_fast.ops import reference
from pecker_fast.ops.layout import INF_KEY, PACK_BLOCK, RADIX_BITS, SUM_WINDOWS, WORD_BITS, radix_shift

from .emulation import library, selection
from .emulation.selection import BRACKET, DIRECT, FALLBACK, Tuning

pytestmark = library.needs_compiler

# Nine tensors: odd sizes, one entry, none, chunks of 8192 and batches of 1024 with and without a rest.
SIZES = (20000, 1, 0, 8192, 33, 12345, 1024, 9217, 31)
SMALL = (3000, 0, 1, 1025)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def order():
    """Runs threads and blocks in different orders, so that a missing barrier shows as a wrong result."""
    chosen = random.choice(("forward", "reverse", "shuffled"))
    selection.set_order(chosen)
    return chosen


def test_constants_are_those_of_python():
    assert selection.layout_constants() == [WORD_BITS, PACK_BLOCK, INF_KEY, *RADIX_BITS]


def split(flat: torch.Tensor, sizes=SIZES, dtypes=(torch.float32,), misaligned: bool = False) -> list[torch.Tensor]:
    tensors = []
    for i, piece in enumerate(flat.split(list(sizes))):
        dtype = dtypes[i % len(dtypes)]
        storage = torch.full((piece.numel() + 16,), float("nan"), dtype=dtype)
        start = i % 5 if misaligned else 0
        tensors.append(storage[start : start + piece.numel()])
        tensors[-1].copy_(piece)
    return tensors


def check_select(scores, ks, ties_all=False, tuning=None, relative=None) -> list[int]:
    ks = torch.tensor(ks, dtype=torch.int64)
    expected = reference.select(scores, ks, ties_all, *(relative or ()))
    actual, used = selection.select(scores, ks, ties_all, tuning, relative)
    for name, a, b in zip(("words", "thresholds", "counts", "nan_count"), actual, expected, strict=True):
        assert torch.equal(a, b), f"{name}: {a} instead of {b}, by {used}"
    return used


# Sizes of the benchmarks' networks, and sizes around the smallest that is sampled.
PLANNED = (4_200_000, 5_000_000, 12_000_000, 38_632_323, 859_520_964, 2_567_463_684)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", PLANNED)
def test_memory_of_a_selection(numel, dtype):
    """At most 6 % of the scores' bytes; each further row takes less than its mask does."""
    size = numel * dtype.itemsize
    for rows in (1, 2, 5, 8, 20):
        plan = selection.plan([numel], [dtype], rows)
        assert plan.bytes <= 0.06 * size + 0.125 * numel * (plan.group - 1), f"{plan.bytes / size:.3f} for {rows} rows"
    # Small scores stay in a GPU's second-level cache: reading them five times is as fast.
    sampled = selection.plan([numel], [dtype]).sampled
    assert sampled if size > 25_000_000 or dtype == torch.float32 else not sampled or size >= 1 << 24


def test_a_network_is_selected_in_one_pass():
    for dtype in DTYPES:
        for numel in PLANNED[3:]:
            assert selection.plan([numel], [dtype], 5).group == 5


def normal(n: int) -> torch.Tensor:
    return torch.randn(n)


def inputs(name: str, n: int) -> torch.Tensor:
    x = normal(n)
    if name == "constant":
        return torch.full((n,), -0.25)
    if name == "zeros":
        return torch.zeros(n)
    if name == "two values":
        return torch.where(x > 0.3, 2.0, -1.0)
    if name == "few values":
        return (x * 4).round() / 4
    if name == "mostly zero":
        return torch.where(x.abs() > 1.2, x, 0.0)
    if name == "special":
        x[torch.rand(n) < 0.05] = float("nan")
        x[torch.rand(n) < 0.05] = float("inf")
        x[torch.rand(n) < 0.05] = float("-inf")
        x[torch.rand(n) < 0.1] = 0.0
        x[torch.rand(n) < 0.05] = -0.0
        return x
    if name == "subnormal":
        return torch.randint(-3000, 3000, (n,), dtype=torch.int32).abs().view(torch.float32) * x.sign()
    if name == "sorted":
        return x.abs().sort().values
    if name == "descending":
        return x.abs().sort(descending=True).values
    if name == "block-scaled":
        return x * torch.exp(2 * torch.randn(n // 64 + 1)).repeat_interleave(64)[:n]
    if name == "all NaN":
        return torch.full((n,), float("nan"))
    return x


NAMES = (
    "normal",
    "constant",
    "zeros",
    "two values",
    "few values",
    "mostly zero",
    "special",
    "subnormal",
    "sorted",
    "descending",
    "block-scaled",
    "all NaN",
)
# A sample of so few entries has a wide bracket.
ROOMY = {"capacity": 1 << 16}


@pytest.mark.parametrize("ties_all", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_inputs(name, ties_all):
    n = sum(SIZES)
    scores = split(inputs(name, n))
    used = check_select(scores, [n // 2, n // 10], ties_all, Tuning(**ROOMY))
    if name == "normal":
        assert used == [BRACKET, BRACKET]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float16,), DTYPES], ids=["bf16", "fp16", "mixed"])
@pytest.mark.parametrize("misaligned", [False, True])
def test_dtypes_and_alignment(dtypes, misaligned):
    n = sum(SIZES)
    scores = split(inputs("special", n), dtypes=dtypes, misaligned=misaligned)
    assert check_select(scores, [n // 3], tuning=Tuning(**ROOMY)) == [BRACKET]


@pytest.mark.parametrize("k", [1, 5, 1000, 40000, 50000, 10**7])
def test_ranks(k):
    check_select(split(inputs("special", sum(SIZES))), [k], tuning=Tuning(**ROOMY))


def test_narrow_bracket():
    """With little sigma and slack the bracket is narrow, so that entries are decided by all three parts."""
    n = 1 << 18
    scores = split(normal(n), sizes=(n,))
    used = check_select(scores, [n // 2], tuning=Tuning(blocks=8, sigmas=3.0, slack=8.0, capacity=n // 16))
    assert used != [DIRECT]


@pytest.mark.parametrize("name", ["constant", "two values", "few values"])
def test_ties_have_a_narrow_bracket(name):
    """Equal keys do not all become candidates: there is room for a small share of them only."""
    n = 1 << 17
    scores = split(inputs(name, n), sizes=(n,))
    assert check_select(scores, [n // 2], tuning=Tuning(capacity=n // 4)) == [BRACKET]


def test_overflow_takes_the_fallback():
    n = sum(SIZES)
    assert check_select(split(normal(n)), [n // 2], tuning=Tuning(capacity=40)) == [FALLBACK]


KINDS_OF_DTYPES = [DTYPES[:1], DTYPES[1:2], DTYPES[2:], DTYPES[1:], DTYPES]


@pytest.mark.parametrize("dtypes", KINDS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["normal", "few values", "special", "zeros"])
def test_missed_bracket_takes_the_fallback(name, dtypes):
    """A bracket with no width misses nearly always."""
    n = sum(SIZES)
    tuning = Tuning(sigmas=-4.0, slack=-2.0, max_log_clusters=6, **ROOMY)
    used = check_select(split(inputs(name, n), dtypes=dtypes), [n // 2, n // 5], tuning=tuning)
    assert DIRECT not in used
    if name == "normal" and dtypes == DTYPES[:1]:
        assert used == [FALLBACK, FALLBACK]


def test_adversarial_sample():
    """The sample is not representative: the bracket misses, and the result is still exact."""
    n = 1 << 16
    ones = torch.ones(n)
    x, used = ones.clone(), []
    octets = n // 8
    for part in range(octets // 8):
        h = part * 0x9E3779B9 & 0xFFFFFFFF
        h ^= h >> 15
        h = h * 0x85EBCA6B & 0xFFFFFFFF
        h ^= h >> 13
        octet = ((part << 16 | h & 0xFFFF) * octets) >> (16 + (octets // 8).bit_length() - 1)
        x[8 * octet : 8 * octet + 8] = torch.linspace(5, 9, 8) + part
    used = check_select([x], [n // 2], tuning=Tuning(**ROOMY))
    assert used == [FALLBACK]


@pytest.mark.parametrize("dtypes", KINDS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_by_histograms_alone(name, dtypes):
    n = sum(SMALL)
    scores = split(inputs(name, n), SMALL, dtypes, misaligned=True)
    tuning = Tuning(min_sampled_bytes=1 << 40)
    assert check_select(scores, [n // 2, 1, n], tuning=tuning) == [DIRECT] * 3
    check_select(scores, [n // 2], True, tuning)


@pytest.mark.parametrize("tuning", [Tuning(min_sampled_bytes=1 << 40), Tuning(**ROOMY), Tuning(capacity=40)])
def test_rows_are_independent(tuning):
    """Rows share histograms, which each restores; a rank out of range keeps nothing."""
    n = sum(SIZES)
    check_select(split(inputs("special", n)), [n // 2, 0, n // 3, n, 7], tuning=tuning)


@pytest.mark.parametrize("ties_all", [False, True])
@pytest.mark.parametrize("name", ["normal", "few values", "special"])
def test_rows_share_a_pass(name, ties_all):
    """More rows than one pass takes, in any order, some of which miss their bracket."""
    n = sum(SIZES)
    ks = [n // 2, n // 10, 1, n // 3, n, 17, n // 100, n // 5, n // 2, 7]
    scores = split(inputs(name, n), dtypes=DTYPES, misaligned=True)
    check_select(scores, ks, ties_all, Tuning(**ROOMY))
    used = check_select(scores, ks[:5], ties_all, Tuning(capacity=3000))
    if name == "normal":
        assert BRACKET in used and FALLBACK in used


@pytest.mark.parametrize("ties_all", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_with_many_equal_digits(dtype, ties_all):
    """More candidates than one block can sort out share the wanted one's first digits: the next step takes another."""
    n = 1 << 17
    x = torch.where(torch.rand(n) < 0.5, 1.0, 1.0078125)
    x[-5:] = float("inf")
    x[:5] = 1e-7
    tuning = Tuning(blocks=8, sigmas=50.0, capacity=n)
    assert check_select([x.to(dtype)], [n // 2, n // 5], ties_all, tuning) == [BRACKET] * 2


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_ties_among_other_values(share):
    """Half of the entries have one value, the others are near it: not all of the equal ones become candidates."""
    n = 1 << 17
    x = torch.where(torch.rand(n) < 0.5, 0.1, 0.1 + 1e-4 * normal(n))
    assert check_select([x], [int(share * n)], tuning=Tuning(blocks=8, capacity=n // 4)) == [BRACKET]


# The production configuration, except for the number of blocks.
PRODUCTION = Tuning(blocks=8, min_sampled_bytes=1 << 24)


@pytest.mark.parametrize("name", ["normal", "constant", "few values", "special", "mostly zero", "block-scaled"])
def test_production_size(name):
    """Five million entries: the sampled way with its own sample, bracket and memory."""
    n = 5_000_000
    sizes = (n // 2 + 3, 0, 1, n - n // 2 - 4)
    used = check_select(split(inputs(name, n), sizes), [n // 2, n // 100], tuning=PRODUCTION)
    assert DIRECT not in used
    # Fewer than half of the entries can be kept, or those of a cluster are too similar.
    if name not in ("mostly zero", "block-scaled"):
        assert used[-1] == BRACKET


def test_production_size_of_narrow_entries():
    """Hundreds of thousands of entries share a magnitude: the boundary runs through ties."""
    n = 20_000_000
    assert check_select([normal(n).to(random.choice(DTYPES[1:]))], [n // 2], tuning=PRODUCTION) == [BRACKET]


@pytest.mark.parametrize("min_sampled_bytes", [1, 1 << 40])
def test_no_entries_and_no_rows(min_sampled_bytes):
    tuning = Tuning(min_sampled_bytes=min_sampled_bytes)
    check_select([], [1, 2], tuning=tuning)
    check_select([torch.empty(0)], [1], tuning=tuning)
    x = torch.tensor([1.0, float("nan")])
    (words, _, _, nan_count), _ = selection.select([x], torch.empty(0, dtype=torch.int64), tuning=tuning)
    assert words.shape == (0, 1) and nan_count == 1


@pytest.mark.parametrize("name", ["few values", "special", "subnormal", "constant"])
def test_threshold_mask(name):
    n = sum(SIZES)
    scores = split(inputs(name, n), dtypes=DTYPES, misaligned=True)
    values = torch.cat([reference.magnitude_keys(t) for t in scores])
    values = values[(values > 0) & (values <= INF_KEY)]
    chosen = values[torch.randint(len(values), (4,))]
    keys = torch.cat([chosen, torch.tensor([1, INF_KEY, 12345678], dtype=torch.int32)]).to(torch.int32)
    limits = torch.tensor([0, 1, 700, 1 << 62, 3, 40, -5])
    actual = selection.threshold_mask(scores, keys, limits)
    for a, b in zip(actual, reference.threshold_mask(scores, keys, limits), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("level", range(3))
@pytest.mark.parametrize("name", ["special", "constant"])
def test_radix_histogram(name, level):
    scores = split(inputs(name, sum(SIZES)), dtypes=DTYPES, misaligned=True)
    keys = reference.magnitude_keys(scores[0])
    picked = keys[torch.tensor([0, 50])] >> (radix_shift(level) + RADIX_BITS[level])
    prefixes = torch.cat([picked, torch.zeros(1)]).to(torch.int32)
    assert torch.equal(
        selection.radix_histogram(scores, prefixes, level), reference.radix_histogram(scores, prefixes, level)
    )


# ---- quotients, and the sums that their damping is made of


def relative_to(name: str, sizes=SIZES, dtypes=(torch.float32,), misaligned: bool = False):
    return split(inputs(name, sum(sizes)), sizes, dtypes, misaligned), torch.rand(len(sizes)).round(decimals=1)


@pytest.mark.parametrize("ties_all", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_quotients(name, ties_all):
    n = sum(SIZES)
    scores = split(inputs(name, n))
    for other in ("normal", "few values"):
        ks = [n // 2, n // 10] if other == "normal" else [n // 2]
        used = check_select(scores, ks, ties_all, Tuning(**ROOMY), relative_to(other))
        if name == other == "normal":
            assert used == [BRACKET, BRACKET]


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float16,), DTYPES], ids=["bf16", "fp16", "mixed"])
@pytest.mark.parametrize("misaligned", [(False, False), (False, True), (True, True)])
def test_quotients_of_dtypes_and_alignments(dtypes, misaligned):
    n = sum(SIZES)
    scores = split(inputs("special", n), dtypes=dtypes, misaligned=misaligned[0])
    relative = relative_to("special", dtypes=dtypes, misaligned=misaligned[1])
    assert check_select(scores, [n // 3], False, Tuning(**ROOMY), relative) == [BRACKET]


@pytest.mark.parametrize("tuning", [Tuning(min_sampled_bytes=1 << 40), Tuning(**ROOMY), Tuning(capacity=40)])
def test_quotients_of_several_rows(tuning):
    n = sum(SIZES)
    scores = split(inputs("special", n), dtypes=DTYPES, misaligned=True)
    relative = relative_to("few values", dtypes=DTYPES, misaligned=True)
    check_select(scores, [n // 2, 0, n // 3, n, 7, n // 100, n // 5, 17, 1], tuning=tuning, relative=relative)


@pytest.mark.parametrize("tuning", [Tuning(**ROOMY), Tuning(min_sampled_bytes=1 << 40)])
def test_quotients_do_not_depend_on_the_launch(tuning):
    n = sum(SIZES)
    scores, relative = split(inputs("block-scaled", n)), relative_to("block-scaled")
    for blocks in (1, 2, 7):
        tuning.blocks = blocks
        check_select(scores, [n // 10], tuning=tuning, relative=relative)


@pytest.mark.parametrize("name", ["few values", "special", "constant"])
def test_threshold_mask_of_quotients(name):
    n = sum(SIZES)
    scores = split(inputs(name, n), dtypes=DTYPES, misaligned=True)
    relative = relative_to("few values", dtypes=DTYPES, misaligned=True)
    chosen = torch.tensor([0.5, 1.0, 2.0, 3.5]).view(torch.int32)
    keys = torch.cat([chosen, torch.tensor([1, INF_KEY, 12345678], dtype=torch.int32)]).to(torch.int32)
    limits = torch.tensor([0, 1, 700, 1 << 62, 3, 40, -5])
    actual = selection.threshold_mask(scores, keys, limits, relative)
    for a, b in zip(actual, reference.threshold_mask(scores, keys, limits, *relative), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("level", range(3))
def test_radix_histogram_of_quotients(level):
    scores, relative = split(inputs("special", sum(SIZES))), relative_to("normal")
    keys = torch.tensor([0.5, 1.75, 1e30]).view(torch.int32)
    prefixes = keys >> (radix_shift(level) + RADIX_BITS[level])
    actual = selection.radix_histogram(scores, prefixes, level, relative)
    assert torch.equal(actual, reference.radix_histogram(scores, prefixes, level, *relative))


def window_sums(sums: torch.Tensor) -> torch.Tensor:
    return sums[:, :SUM_WINDOWS] + (sums[:, SUM_WINDOWS:-1] << 32)


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "wide"])
def test_magnitude_sums(name, misaligned):
    n = sum(SIZES)
    values = torch.ldexp(normal(n), torch.randint(-120, 120, (n,))) if name == "wide" else inputs(name, n)
    tensors = split(values, dtypes=DTYPES if misaligned else DTYPES[:1], misaligned=misaligned)
    expected = reference.magnitude_sums(tensors)
    for blocks in (1, 3, 64):
        sums = selection.magnitude_sums(tensors, blocks)
        assert torch.equal(sums[:, -1], expected[:, -1])
        assert torch.equal(window_sums(sums), window_sums(expected))
