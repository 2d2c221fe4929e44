"""Timing: alternatives taken in turns in one process, and ratios of their medians.

Times of a shared machine drift by more than the differences that matter; ratios of runs taken right after each other do
not. So nothing here measures one alternative alone.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, in order."""

    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """Linear interpolation between the order statistics."""
        ordered = sorted(self.seconds)
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float]:
        return {"p20": self.quantile(0.2), "p50": self.median, "p80": self.quantile(0.8)}


def ratio_of_medians(numerator: Timing, denominator: Timing) -> float:
    return numerator.median / denominator.median


def median_of_ratios(numerator: Timing, denominator: Timing) -> float:
    """Median over rounds of the ratio within a round; what drifts slower than a round cancels."""
    return statistics.median(n / d for n, d in zip(numerator.seconds, denominator.seconds, strict=True))


class Clock:
    """Times one call on ``device``: perf_counter on the CPU; CUDA events after a cache flush on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds that ``function`` takes."""
        if self._flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Besides emptying the cache, the flush keeps the GPU busy while Python launches what is timed.
        self._flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def interleave(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = 30,
    warmup: int = 3,
    max_seconds: float = 20.0,
    min_repeats: int = 3,
) -> dict[str, Timing]:
    """Runs the functions in turns (A, B, A, B, ...) and returns the timing of each.

    ``repeats`` rounds after ``warmup`` unmeasured ones; fewer, but at least ``min_repeats``, once ``max_seconds`` are
    spent. Slow functions are warmed up once.
    """
    clock = Clock(device)
    began = time.perf_counter()
    for round_ in range(warmup):
        if round_ and time.perf_counter() - began > max_seconds / 10:
            break
        for function in functions.values():
            clock(function)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    began = time.perf_counter()
    for done in range(repeats):
        if done >= min_repeats and time.perf_counter() - began > max_seconds:
            break
        for name, function in functions.items():
            seconds[name].append(clock(function))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
