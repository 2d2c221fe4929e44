"""select, threshold_mask and radix_histogram against a full stable sort."""

import math

import numpy as np
import pytest
import torch

from pecker_fast import ops
from tests import oracle
from tests.conftest import available_backends
from tests.inputs import FLOATS, SCORE_KINDS, same_bits, scores

SIZES = [0, 1, 31, 32, 33, 1023]
PRIME = 999_983


def check_rows(result, expected: list[oracle.Selection]) -> None:
    """All four results, bit for bit; bits past the ends of tensors included."""
    words, thresholds, counts, nan_count = result
    assert words.dtype == torch.int32 and thresholds.dtype == torch.float32
    assert counts.dtype == torch.int64 and nan_count.dtype == torch.int64 and nan_count.shape == ()
    assert words.shape[0] == thresholds.shape[0] == counts.shape[0] == len(expected)
    for j, row in enumerate(expected):
        assert (words[j].cpu().numpy() == oracle.all_words(row.masks)).all()
        assert thresholds[j].item() == row.threshold
        assert counts[j].item() == row.count
        assert nan_count.item() == row.nan_count


def check_select(tensors, ks, ties_all, backend, device) -> None:
    moved = [t.to(device) for t in tensors]
    result = ops.select(moved, torch.tensor(ks, device=device), ties_all, backend=backend)
    check_rows(result, oracle.selections(tensors, ks, ties_all))
    assert all(same_bits(a.cpu(), b) for a, b in zip(moved, tensors, strict=True)), "scores were written to"


@pytest.mark.parametrize("ties_all", [False, True])
@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_select_kinds(kind, ties_all, backend, device, small):
    n = 1500 if small else 40_000
    dtype = FLOATS[np.random.randint(3)]
    tensors = [scores(kind, size, dtype) for size in (33, n, 0, 1, 1023)]
    total = sum(t.numel() for t in tensors)
    ks = [1, total, int(np.random.randint(1, total)), total + 5]
    check_select(tensors, ks[2:3] if small else ks, ties_all, backend, device)


@pytest.mark.parametrize("numel", SIZES)
def test_select_sizes(numel, backend, device):
    for dtype in FLOATS:
        tensors = [scores("special", numel, dtype)]
        check_select(tensors, [max(1, numel // 2), max(1, numel)], False, backend, device)


def test_select_prime_size(backend, device, small):
    n = 20_011 if small else PRIME
    tensors = [scores("heavy", n)]
    check_select(tensors, [int(np.random.randint(1, n))], False, backend, device)
    # Rounded to bfloat16, hundreds of entries share each magnitude, so the boundary runs through ties.
    check_select([t.bfloat16() for t in tensors], [n // 3], False, backend, device)


def test_select_many_mixed_tensors(backend, device, small):
    sizes = np.random.randint(0, 70, size=30 if small else 300).tolist()
    tensors = [scores("ties" if n % 2 else "special", n, FLOATS[i % 3]) for i, n in enumerate(sizes)]
    tensors += [torch.tensor(-2.5), torch.randn(3, 5, 7), torch.randn(2, 0, 4), torch.tensor(0.5, dtype=torch.float16)]
    total = sum(t.numel() for t in tensors)
    check_select(tensors, [total // 2] if small else [1, total // 10, total // 2], False, backend, device)
    check_select(tensors, [total // 3], True, backend, device)


def test_select_is_exact_at_adjacent_floats(backend, device):
    # Keys differ in the last bit only, so every level of a radix selection is needed.
    base = torch.tensor([1.0]).view(torch.int32)
    values = (base + torch.randperm(700, dtype=torch.int32)).view(torch.float32)
    values *= torch.where(torch.rand(700) < 0.5, -1, 1)
    check_select([values[:300].clone(), values[300:].clone()], [1, 350, 699], False, backend, device)


def test_select_one_large_tie_group_across_tensors(backend, device, small):
    n = 700 if small else 70_000
    tensors = [torch.full((n,), 2.0), torch.full((31,), -2.0), torch.full((n,), 2.0)]
    tensors[1][3] = 5.0
    check_select(tensors, [n - 1, n + 1, n + 20, 2 * n], False, backend, device)


def test_select_of_nothing(backend, device):
    for tensors in ([], [torch.zeros(0)], [torch.zeros(2, 0), torch.zeros(0, dtype=torch.bfloat16)]):
        check_select(tensors, [1, 7], False, backend, device)


def test_threshold_mask(backend, device, small):
    tensors = [scores("special", n, FLOATS[i % 3]) for i, n in enumerate((400, 33, 0, 700 if small else 50_000))]
    tensors.append(scores("ties", 500))
    thresholds = [0.5, 1.0, 1.5, math.inf]
    limits = [0, 3, 2**62, 1]
    keys = torch.tensor(thresholds).view(torch.int32)
    result = ops.threshold_mask(
        [t.to(device) for t in tensors], keys.to(device), torch.tensor(limits, device=device), backend=backend
    )
    check_rows(result, [oracle.keep_at_least(tensors, t, n) for t, n in zip(thresholds, limits, strict=True)])


def test_threshold_mask_smallest_key_keeps_all_but_zero_and_nan(backend, device):
    tensors = [scores("special", 500), scores("subnormal", 300)]
    one = torch.ones(1, dtype=torch.int32, device=device)
    result = ops.threshold_mask(
        [t.to(device) for t in tensors], one, torch.tensor([2**63 - 1], device=device), backend=backend
    )
    check_rows(result, [oracle.keep_at_least(tensors, 2.0**-149)])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_radix_histogram(level, backend, device, small):
    tensors = [scores("special", n, FLOATS[i % 3]) for i, n in enumerate((33, 0, 700 if small else 60_000))]
    tensors += [scores("ties", 501), scores("subnormal", 300)]
    keys = np.concatenate([np.abs(oracle.to_numpy(t)).astype(np.float32).view(np.int32).reshape(-1) for t in tensors])
    shift = {0: 31, 1: 20, 2: 10}[level]
    prefixes = [int(np.random.choice(keys[keys <= 0x7F800000])) >> shift for _ in range(3)] + [5]
    counts = ops.radix_histogram(
        [t.to(device) for t in tensors],
        torch.tensor(prefixes, dtype=torch.int32, device=device),
        level,
        backend=backend,
    )
    assert counts.dtype == torch.int64
    expected = np.stack([oracle.histogram(tensors, prefix, level) for prefix in prefixes])
    assert counts.shape == expected.shape and (counts.cpu().numpy() == expected).all()


def test_views_with_a_storage_offset(backend, device):
    storage = scores("special", 3000).to(device)
    tensors = [storage[start : start + n] for start, n in ((1, 500), (3, 65), (7, 1023), (501, 1))]
    result = ops.select(tensors, torch.tensor([400], device=device), backend=backend)
    check_rows(result, [oracle.select([t.cpu() for t in tensors], 400)])


# The second is large enough for a sample on the CPU.
@pytest.mark.parametrize("numels", [(100_003, 31, 70_001, 5), (200_003, 31, 70_001, 5)])
@pytest.mark.parametrize("kind", ["ties", "special"])
def test_same_bits_with_any_number_of_threads(kind, numels, backend, device):
    if device != "cpu" or backend == "triton":
        pytest.skip("no threads to set")
    tensors = [scores(kind, n, FLOATS[i % 3]) for i, n in enumerate(numels)]
    ks = torch.tensor([60_000, 17, 1_500])
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(ops.select(tensors, ks, backend=backend))
    finally:
        torch.set_num_threads(threads)
    check_rows(results[0], oracle.selections(tensors, ks.tolist()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- many entries on the CPU: a sample, brackets around the thresholds, and one pass for several rows

# Fewer are selected by histograms alone.
MANY = 263_000


@pytest.fixture
def cpu():
    if "cpu" not in available_backends():
        pytest.skip("the CPU kernels are not tested here")


def many_scores(kind: str, dtypes) -> list[torch.Tensor]:
    return [scores(kind, n, dtypes[i % len(dtypes)]) for i, n in enumerate((100_001, 33, MANY - 110_001, 0, 9_967, 1))]


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_many_entries_several_rows(kind, cpu):
    for dtypes in ([torch.float32], FLOATS):
        tensors = many_scores(kind, dtypes)
        ks = [MANY // 2, 1, int(np.random.randint(1, MANY)), MANY // 10, MANY]
        check_select(tensors, ks, False, "cpu", "cpu")


@pytest.mark.parametrize("kind", ["normal", "ties", "two_valued", "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_entries_all_ties(kind, dtype, cpu):
    tensors = many_scores(kind, [dtype])
    check_select(tensors, [MANY // 3, MANY // 100], True, "cpu", "cpu")


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e38])
def test_many_entries_below_a_third_of_infinities(scale, cpu):
    """Up to a threshold among the largest floats, and of tensors whose last vectors are not full."""
    tensors = many_scores("normal", [torch.float32])
    for tensor in tensors:
        tensor.mul_(scale)[torch.rand(tensor.shape) < 0.37] = math.inf
    for k in (MANY // 2, MANY * 2 // 5, MANY * 3 // 4):
        check_select(tensors, [k], True, "cpu", "cpu")


def test_many_entries_more_rows_than_a_pass_takes(cpu):
    tensors = many_scores("normal", [torch.float32])
    # The brackets of neighbouring rows overlap.
    ks = [50_000 + 40 * i for i in range(6)] + [10, 1_000, 20_000, 130_000, 131_000, 250_000]
    check_select(tensors, ks, False, "cpu", "cpu")
    thresholds = torch.linspace(0.01, 3.0, 11)
    result = ops.threshold_mask(tensors, thresholds.view(torch.int32), torch.full((11,), 2**63 - 1), backend="cpu")
    check_rows(result, [oracle.keep_at_least(tensors, float(t)) for t in thresholds])


def sampled_entries(numel: int) -> np.ndarray:
    """The entries of one tensor that csrc/cpu/select_sample.cpp samples, as a bool array."""
    groups, group = 8192, 64
    g = np.arange(groups, dtype=np.uint64)
    x = g * np.uint64(0x9E3779B9) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> np.uint64(shift)) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
    u = (x ^ x >> np.uint64(16)) / 2.0**32
    at = ((g + u) * (numel / groups)).astype(np.int64)
    piece = at // 16384 * 16384
    offset = np.minimum((at - piece) // group * group, np.minimum(16384, numel - piece) - group)
    chosen = np.zeros(numel, dtype=bool)
    for i in range(group):
        chosen[piece + offset + i] = True
    return chosen


@pytest.mark.parametrize("unlike", ["smaller", "larger", "tied"])
def test_many_entries_that_the_sample_does_not_show(unlike, cpu):
    # The brackets miss, or hold far more entries than expected: then histograms of all entries decide.
    n = 2_000_003
    x = scores("normal", n)
    sampled = torch.from_numpy(sampled_entries(n))
    assert 0.1 < sampled.double().mean() < 0.5
    x = {
        "smaller": torch.where(sampled, x, x * 2.0**-40),
        "larger": torch.where(sampled, x, x * 2.0**40),
        "tied": torch.where(sampled, x, torch.tensor(float(x.abs().median()))),
    }[unlike]
    check_select([x], [n // 2, n // 10], False, "cpu", "cpu")
