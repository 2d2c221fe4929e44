"""What ``--profile`` measures: time by region, throughput, memory, energy, and a trace of a few iterations."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .memory import peak_memory_bytes
from .meter import GpuMeter
from .regions import Regions

# Iterations before, of torch's profiler warming up, and traced. What they measure is left out of the figures.
WAIT, WARMUP, TRACED = 2, 1, 2


class Profiler:
    """Measures the iterations of a loop.

    Parameters
    ----------
    regions: those that the iterations enter.
    device: where they compute.
    trace: file for a trace in Chrome's format (chrome://tracing, Perfetto), or None.
    """

    def __init__(self, regions: Regions, device: torch.device | str, trace: Path | None = None) -> None:
        self.regions, self.device = regions, torch.device(device)
        self.meter = GpuMeter(device)
        self.iterations = self.images = 0
        self.seconds = 0.0
        self.joules: float | None = 0.0 if self.meter.missing is None else None
        self._since: float | None = None
        self._joules_since: float | None = None
        self._logged: dict[str, float] = {}
        self.outside_seconds: dict[str, float] = {}
        self._trace, self._torch = trace, None
        self._left = 0

    def start(self, iterations: int) -> None:
        """Before ``iterations`` iterations. There is a trace where they are more than twice what it takes."""
        self._left = WAIT + WARMUP + TRACED
        if self._trace is None or iterations <= 2 * self._left:
            self._left = 0
            return
        from torch.profiler import ProfilerActivity, profile, schedule

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])
        self._torch = profile(
            activities=kinds,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=TRACED, repeat=1),
            on_trace_ready=lambda done: done.export_chrome_trace(str(self._trace)),
        )
        self._torch.start()

    def resume(self) -> None:
        """The clock runs: iterations follow."""
        self._since, self._joules_since = time.perf_counter(), self.meter.joules()

    def pause(self) -> None:
        """The clock stops: something else follows, such as an evaluation. The device must have finished."""
        if self._since is None:
            return
        self.seconds += time.perf_counter() - self._since
        if self.joules is not None:
            self.joules += self.meter.joules() - self._joules_since
        self._since = None

    @contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Measures what comes between iterations, such as an evaluation. The clock of the iterations stands still."""
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self.outside_seconds[name] = self.outside_seconds.get(name, 0.0) + time.perf_counter() - start

    def step(self, images: int) -> None:
        """An iteration of ``images`` images is over."""
        self.iterations += 1
        self.images += images
        if self._torch is None:
            return
        self._torch.step()
        self._left -= 1
        if self._left == 0:
            self._torch.stop()
            self._torch = None
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._restart()

    def _restart(self) -> None:
        self.regions.reset()
        self._logged = {}
        self.iterations = self.images = 0
        self.seconds, self.joules = 0.0, None if self.joules is None else 0.0
        self.resume()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._torch is not None:
            self._torch.stop()
            self._torch = None

    def record(self) -> dict[str, Any]:
        """For a line of the log: seconds by region since the last one, memory, utilisation, energy so far. Waits for
        the device."""
        totals = self.regions.totals()
        since = {name: value - self._logged.get(name, 0.0) for name, value in totals.items()}
        self._logged = totals
        said: dict[str, Any] = {"profile_seconds": since, "peak_memory_bytes": peak_memory_bytes(self.device)}
        if self.joules is not None:
            said |= {"energy_joules": self.joules, "gpu_utilization": self.meter.utilization()}
        return said

    def summary(self, all_joules: float | None = None) -> dict[str, Any]:
        """Figures of all iterations measured; ``all_joules``: energy of the GPUs of all processes."""
        per_second = self.images / self.seconds if self.seconds else 0.0
        energy = None if all_joules is None else all_joules / max(1, self.images)
        return {
            "iterations": self.iterations,
            "seconds": self.seconds,
            "images_per_second": per_second,
            "joules_per_image": energy,
            "peak_memory_bytes": peak_memory_bytes(self.device),
            "seconds_by_region": self.regions.totals(),
            "seconds_outside": dict(self.outside_seconds),
        }

    def table(self, all_joules: float | None = None) -> str:
        """Milliseconds an iteration and share of the time for each region; what lies in none is the row "other"."""
        said = self.summary(all_joules)
        totals = said["seconds_by_region"]
        totals["other"] = max(0.0, self.seconds - sum(totals.values()))
        width = max(len(name) for name in [*totals, "iteration"])
        lines = [f"{'':{width}} {'ms/iteration':>13} {'share':>7}"]
        for name, value in [*totals.items(), ("iteration", self.seconds)]:
            share = value / self.seconds if self.seconds else 0.0
            lines.append(f"{name:{width}} {1e3 * value / max(1, self.iterations):13.2f} {share:7.1%}")
        energy = said["joules_per_image"]
        joules = f"energy not measured ({self.meter.missing})" if energy is None else f"{energy:.3g} J/image"
        lines.append(
            f"{self.iterations} iterations; {said['images_per_second']:.1f} images/s; {joules}; "
            f"peak memory {said['peak_memory_bytes'] / 2**20:.0f} MiB"
        )
        if self.outside_seconds:
            between = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.outside_seconds.items())
            lines.append(f"beside the iterations: {between}")
        return "\n".join(lines)
