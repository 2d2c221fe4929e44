"""Distances from the frontier of a method's settings."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Frontier:
    """The frontier of one method's settings in the plane of time (x) and cost (y), both better if lower.

    Only settings count for which no other is at least as good in both. Between two of them the cost is interpolated
    linearly; beyond the ends it is constant. Taking the best of noisy points flatters the frontier.

    Parameters
    ----------
    xs, ys : tuple of float
        Ascending times, and their descending costs.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float | None, float | None]]) -> "Frontier | None":
        """From (x, y) of each setting, without those that have a None. None if no setting is left."""
        best: list[tuple[float, float]] = []
        for x, y in sorted((x, y) for x, y in points if x is not None and y is not None):
            if not best or y < best[-1][1]:
                best.append((x, y))
        return cls(*map(tuple, zip(*best, strict=True))) if best else None

    def cost(self, x: float) -> float:
        """The frontier's cost at x."""
        if x <= self.xs[0]:
            return self.ys[0]
        for i in range(1, len(self.xs)):
            if x <= self.xs[i]:
                share = (x - self.xs[i - 1]) / (self.xs[i] - self.xs[i - 1])
                return self.ys[i - 1] + share * (self.ys[i] - self.ys[i - 1])
        return self.ys[-1]
