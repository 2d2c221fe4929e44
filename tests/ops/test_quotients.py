"""Selections of quotients of scores, and the exact sums behind their damping."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from pecker_fast import ops
from pecker_fast.ops.layout import SUM_COLUMNS, SUM_WINDOWS
from pecker_fast.ops.means import magnitude_means
from tests import oracle
from tests.conftest import available_backends
from tests.inputs import FLOATS, SCORE_KINDS, same_bits, scores
from tests.ops.test_select import check_rows

SIZES = (33, 1500, 0, 1, 1023)
DAMPINGS = (0.0, 0.01, 3e38)


def pairs(kind: str, sizes=SIZES, dtypes=FLOATS) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Scores of one kind, and others of another kind."""
    other = SCORE_KINDS[np.random.randint(len(SCORE_KINDS))]
    own = [scores(kind, n, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]
    return own, [scores(other, n, dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)]


def check_select(own, others, damping, ks, ties_all, backend, device) -> None:
    damping = torch.tensor([float(d) for d in damping])
    expected = [torch.from_numpy(quotient_of(s, r, d)) for s, r, d in zip(own, others, damping.tolist(), strict=True)]
    moved, moved_others = ([t.to(device) for t in tensors] for tensors in (own, others))
    ks_there = torch.tensor(ks, device=device)
    result = ops.select(moved, ks_there, ties_all, moved_others, damping.to(device), backend=backend)
    check_rows(result, oracle.selections(expected, ks, ties_all))
    for before, after in ((own, moved), (others, moved_others)):
        assert all(same_bits(a.cpu(), b) for a, b in zip(after, before, strict=True)), "inputs were written to"


def quotient_of(score: torch.Tensor, other: torch.Tensor, damping: float) -> np.ndarray:
    s, r = (np.abs(oracle.to_numpy(t)).astype(np.float32) for t in (score, other))
    with np.errstate(all="ignore"):
        denominators = r + np.float32(damping)
        return np.asarray(s / np.where(denominators < np.float32(2.0**-126), np.float32(2.0**-126), denominators))


@pytest.mark.parametrize("ties_all", [False, True])
@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_select_kinds(kind, ties_all, backend, device, small):
    own, others = pairs(kind)
    total = sum(SIZES)
    damping = [DAMPINGS[np.random.randint(3)] for _ in own]
    ks = [int(np.random.randint(1, total)), 1, total, total + 5]
    check_select(own, others, damping, ks[:1] if small else ks, ties_all, backend, device)


def test_rules_for_zeros_infinities_and_nan(backend, device):
    inf, nan = math.inf, math.nan
    #           0 / 0  x / 0  0 / x  x / inf  inf / x  inf / inf  nan / x  x / nan  0 / nan  overflow  underflow  plain
    own = [torch.tensor([0.0, 2.0, 0.0, 3.0, inf, inf, nan, 3.0, 0.0, 1e30, 1e-38, -6.0], device=device)]
    others = [torch.tensor([0.0, 0.0, 2.0, inf, -2.0, inf, 2.0, nan, nan, 1e-30, 1e30, 4.0], device=device)]
    none = torch.zeros(1, device=device)
    one = torch.ones(1, dtype=torch.int32, device=device)
    limit = torch.tensor([2**63 - 1], device=device)
    words, thresholds, counts, nans = ops.threshold_mask(own, one, limit, others, none, backend=backend)
    selected = [1, 4, 9, 11]  # 2 / 2 ** -126, inf, inf, 1.5
    assert int(words[0, 0]) == sum(1 << i for i in selected) and int(counts[0]) == len(selected)
    assert float(thresholds[0]) == 1.5 and int(nans) == 4
    words, thresholds, _, _ = ops.select(own, torch.tensor([3], device=device), False, others, none, backend=backend)
    assert int(words[0, 0]) == sum(1 << i for i in (1, 4, 9)) and float(thresholds[0]) == 2.0**127


@pytest.mark.parametrize("level", [0, 1, 2])
def test_radix_histogram(level, backend, device):
    own, others = ([scores(kind, n, FLOATS[i % 3]) for i, n in enumerate(SIZES)] for kind in ("special", "normal"))
    damping = torch.full((len(own),), 0.125)
    expected = [torch.from_numpy(quotient_of(s, r, 0.125)) for s, r in zip(own, others, strict=True)]
    keys = np.concatenate([t.numpy().view(np.int32).reshape(-1) for t in expected])
    prefixes = [int(np.random.choice(keys[keys <= 0x7F800000])) >> {0: 31, 1: 20, 2: 10}[level], 5]
    counts = ops.radix_histogram(
        [t.to(device) for t in own],
        torch.tensor(prefixes, dtype=torch.int32, device=device),
        level,
        [t.to(device) for t in others],
        damping.to(device),
        backend=backend,
    )
    assert (counts.cpu().numpy() == np.stack([oracle.histogram(expected, p, level) for p in prefixes])).all()


@pytest.mark.parametrize("limits", [(0, 3, 2**62), (1, 7, 40)])
def test_threshold_mask_with_ties(limits, backend, device):
    own, others = ([scores("ties", n, FLOATS[i % 3]) for i, n in enumerate(SIZES)] for _ in range(2))
    damping = torch.full((len(own),), 0.5)
    expected = [torch.from_numpy(quotient_of(s, r, 0.5)) for s, r in zip(own, others, strict=True)]
    thresholds = [0.5, 1.0, 3.0]
    result = ops.threshold_mask(
        [t.to(device) for t in own],
        torch.tensor(thresholds).view(torch.int32).to(device),
        torch.tensor(limits, device=device),
        [t.to(device) for t in others],
        damping.to(device),
        backend=backend,
    )
    check_rows(result, [oracle.keep_at_least(expected, t, n) for t, n in zip(thresholds, limits, strict=True)])


def test_views_with_a_storage_offset(backend, device):
    own, others = (scores("special", 3000).to(device) for _ in range(2))
    cut = lambda storage, shift: [storage[s + shift : s + shift + n] for s, n in ((1, 500), (4, 65), (7, 1023))]  # noqa: E731
    check_select(cut(own, 0), cut(others, 3), [0.25] * 3, [400], False, backend, device)


# ---- sums


def window_sums(row: list[int]) -> list[int]:
    return [low + (high << 32) for low, high in zip(row[:SUM_WINDOWS], row[SUM_WINDOWS:-1], strict=True)]


@pytest.mark.parametrize("kind", SCORE_KINDS)
def test_sums_are_exact(kind, backend, device, small):
    sizes = (0, 1, 33, 700 if small else 20_011)
    for dtype in FLOATS:
        tensors = [scores(kind, n, dtype) for n in sizes]
        sums = ops.magnitude_sums([t.to(device) for t in tensors], backend=backend)
        assert sums.shape == (len(sizes), SUM_COLUMNS) and sums.dtype == torch.int64
        for row, tensor in zip(sums.tolist(), tensors, strict=True):
            exact = sum(value * Fraction(2) ** (16 * w - 150) for w, value in enumerate(window_sums(row)))
            assert exact == oracle.exact_sum(tensor)
            assert row[-1] == int(tensor.isfinite().sum())
        assert [window_sums(row) for row in sums.tolist()] == [
            window_sums(row) for row in ops.magnitude_sums(tensors, backend="reference").tolist()
        ]
        means = magnitude_means(sums)
        assert torch.equal(means.cpu(), magnitude_means(sums.cpu())) and means.dtype == torch.float64
        for mean, tensor in zip(means.tolist(), tensors, strict=True):
            exact = oracle.exact_sum(tensor) / max(int(tensor.isfinite().sum()), 1)
            assert mean == pytest.approx(float(exact), rel=2**-50, abs=0)


def test_sums_have_one_value_for_every_exponent(backend, device):
    # Each window has its own columns, up to the largest and down to the smallest float32.
    exponents = torch.arange(-149, 128)
    values = torch.ldexp(torch.ones(277), exponents).to(device)
    sums = ops.magnitude_sums(
        [values, torch.full((3,), -torch.finfo(torch.float32).max, device=device)], backend=backend
    )
    whole = [sum(v << (16 * w) for w, v in enumerate(window_sums(row))) for row in sums.tolist()]
    assert whole == [sum(1 << (int(e) + 150) for e in exponents), 3 * ((1 << 24) - 1) << (104 + 150)]


def test_sums_need_tensors_of_one_device_and_dtype(backend, device):
    assert ops.magnitude_sums([], backend=backend).shape == (0, SUM_COLUMNS)
    for wrong, match in ((torch.zeros(3, dtype=torch.float64), "tensors"), (torch.zeros(4, 5).t(), "contiguous")):
        with pytest.raises((TypeError, ValueError), match=match):
            ops.magnitude_sums([torch.zeros(3, device=device), wrong.to(device)], backend=backend)


# ---- many entries on the CPU: samples and brackets, see test_select.py

MANY = 263_000


@pytest.fixture
def cpu():
    if "cpu" not in available_backends():
        pytest.skip("the CPU kernels are not tested here")


@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "constant", "special"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_many_entries(kind, dtype, cpu):
    sizes = (100_001, 33, MANY - 110_001, 0, 9_967, 1)
    own, others = pairs(kind, sizes, [dtype])
    ks = [MANY // 2, 1, int(np.random.randint(1, MANY)), MANY // 10]
    check_select(own, others, [0.01] * len(sizes), ks, False, "cpu", "cpu")
    check_select(own, others, [0.0] * len(sizes), ks[:1], True, "cpu", "cpu")


def test_same_bits_with_any_number_of_threads(cpu):
    own, others = pairs("heavy", (200_003, 31, 70_001, 5))
    damping = torch.full((4,), 0.01)
    ks = torch.tensor([60_000, 17])
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            sums = ops.magnitude_sums(others, backend="cpu")
            results.append((sums, *ops.select(own, ks, False, others, damping, backend="cpu")))
        for result in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(threads)
