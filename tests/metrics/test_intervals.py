"""Intervals of shares, against the binomial distribution."""

import math

import pytest

from pecker_fast.metrics.intervals import proportion_interval


@pytest.mark.parametrize(("successes", "count"), [(0, 10), (5, 10), (99, 100), (100, 100), (7, 2000)])
def test_wilsons_interval_solves_its_equation(successes, count):
    """At its ends the share is 1.96 standard errors away, with the standard error at the end itself."""
    low, high = proportion_interval(successes, count)
    share = successes / count
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(share - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.959964, abs=1e-5)


def test_it_covers_as_often_as_it_says():
    """The probability that the interval has the true share in it, exactly, mean over shares."""
    count, covered = 40, []
    for tenth in range(1, 20):
        true = tenth / 20
        inside = [
            k for k in range(count + 1) if proportion_interval(k, count)[0] <= true <= proportion_interval(k, count)[1]
        ]
        covered.append(sum(math.comb(count, k) * true**k * (1 - true) ** (count - k) for k in inside))
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (3, 2), (-1, 2)])
def test_no_share(successes, count):
    with pytest.raises(ValueError, match="successes is"):
        proportion_interval(successes, count)
