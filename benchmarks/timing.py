"""Timing: alternatives taken in turns in one process, and ratios of their medians.

Times of a shared machine drift by more than the differences that matter; ratios of runs taken right after each other do
not. So nothing here measures one alternative alone.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU
# Size of each of the two buffers of a copy: far beyond every cache.
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


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
    """Median over rounds of the ratio within a round, in which drift slower than a round cancels."""
    return statistics.median(n / d for n, d in zip(numerator.seconds, denominator.seconds, strict=True))


class Clock:
    """Times one call on ``device``: perf_counter on the CPU; CUDA events after a cache flush on the GPU.

    The GPU sleeps until everything is launched. Otherwise the events of a call that launches slower than the GPU works
    would time Python.
    """

    # The sleep as a multiple of the launch time, and its minimum.
    SLEEP_SHARE, LEAST_SLEEP = 1.5, 2e-4

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = None
        self._launch_seconds: dict[Callable, float] = {}
        if device.type == "cuda":
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
            self._cycles_per_second = self._calibrate()

    @staticmethod
    def _calibrate() -> float:
        """Cycles of ``torch.cuda._sleep`` in a second."""
        cycles = 20_000_000
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles // 10)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles / (start.elapsed_time(end) / 1000)

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds that ``function`` takes."""
        if self._flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        launching = self._launch_seconds.get(function, 0.0)
        self._flush.zero_()
        torch.cuda._sleep(int(max(self.SLEEP_SHARE * launching, self.LEAST_SLEEP) * self._cycles_per_second))
        start.record()
        began = time.perf_counter()
        function()
        launched = time.perf_counter() - began
        end.record()
        end.synchronize()
        # The shortest counts: the first call may compile or allocate.
        self._launch_seconds[function] = min(launching or launched, launched)
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


@cache
def copy_on(device: torch.device) -> tuple[Callable[[], object], int]:
    """A large copy within the device's memory, and the bytes that it reads and writes in total. It measures the
    memory's speed, timed in turns with the alternatives."""
    size = COPY_BYTES[device.type]
    # Written once, so that the pages are mapped.
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2 * size


def launch_seconds(function: Callable[[], object], device: torch.device, repeats: int = 50) -> float:
    """Median seconds that a call occupies the CPU; on a GPU the work itself runs on asynchronously."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    wait()
    return statistics.median(seconds)


def cpu_seconds(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = 60, calls: int = 20
) -> dict[str, float]:
    """Processor seconds of one call of each function: the minimum of many, timed in turns. Other load on the machine
    affects it only through shared caches."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(calls):
                function()
            best[name] = min(best[name], (time.process_time() - start) / calls)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return best


def launches(function: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call puts on the GPU."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
