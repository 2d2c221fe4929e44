"""Means over a few seeds with confidence intervals, and paired differences."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over ``count`` values with its confidence interval, None for fewer than two values.

    ``censored`` of the values are lower bounds only; if there are any, so is the mean.
    """

    mean: float
    low: float | None
    high: float | None
    count: int
    censored: int = 0

    @property
    def side(self) -> int:
        """-1 if the whole interval is below 0, 1 if it is above 0, otherwise 0."""
        if self.low is None:
            return 0
        return (self.low > 0) - (self.high < 0)

    def text(self, number: Callable[[float], str]) -> str:
        """Mean and interval, such as "1.0 (0.5 to 1.5)"; "≥" marks a lower bound. ``number`` formats a value."""
        mean = ("≥ " if self.censored else "") + number(self.mean)
        return mean if self.low is None else f"{mean} ({number(self.low)} to {number(self.high)})"


def interval(values: Sequence[float], censored: int = 0, level: float = LEVEL) -> Interval | None:
    """Student's t interval of the mean; None for no values.

    The values are assumed to be independent and about normal. ImportError if scipy is missing.
    """
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values), censored)
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("confidence intervals need scipy: pip install 'pecker-fast[train]'") from error
    quantile = float(stats.t.ppf(0.5 + level / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values), censored)


def paired(values: Mapping, others: Mapping) -> Interval | None:
    """Interval of value minus other over the keys (seeds) that both have; None counts as missing."""
    both = [key for key in values if values[key] is not None and others.get(key) is not None]
    return interval([values[key] - others[key] for key in both])


def proportion_interval(successes: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share, which is of use near 0 and 1 too.

    Parameters
    ----------
    successes, count : int
        ``successes`` of ``count`` independent trials.
    level : float
        Confidence, in (0, 1).

    Returns
    -------
    tuple of float
        Its ends, in [0, 1].

    Raises
    ------
    ValueError
        If ``count`` is less than 1, or ``successes`` is not in 0 to ``count``.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"successes is {successes}, expected 0 to count, which is {count}, expected at least 1")
    share, z = successes / count, statistics.NormalDist().inv_cdf(0.5 + level / 2)
    middle = share + z * z / (2 * count)
    half = z * math.sqrt((share * (1 - share) + z * z / (4 * count)) / count)
    low, high = ((middle + side * half) / (1 + z * z / count) for side in (-1, 1))
    return (0.0 if successes == 0 else low), (1.0 if successes == count else high)
