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

# Iterations before the trace, for torch's profiler to warm up, and in the trace. They are excluded from the figures.
WAIT, WARMUP, TRACED = 2, 1, 2


class Profiler:
    """Measures the iterations of a loop.

    Parameters
    ----------
    regions : Regions
        The regions that the iterations enter.
    device : torch.device or str
        Device of the computation.
    trace : Path, optional
        File for a trace in Chrome's format (chrome://tracing, Perfetto).
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
        """Starts before ``iterations`` iterations. Short runs, of at most twice the trace's length, have no trace."""
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
        """Starts the clock: iterations follow."""
        self._since, self._joules_since = time.perf_counter(), self.meter.joules()

    def pause(self) -> None:
        """Stops the clock before other work, such as an evaluation. The device must have finished."""
        if self._since is None:
            return
        self.seconds += time.perf_counter() - self._since
        if self.joules is not None:
            self.joules += self.meter.joules() - self._joules_since
        self._since = None

    @contextmanager
    def outside(self, name: str) -> Iterator[None]:
        """Measures work between iterations, such as an evaluation, while the clock of the iterations is stopped."""
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self.outside_seconds[name] = self.outside_seconds.get(name, 0.0) + time.perf_counter() - start

    def step(self, images: int) -> None:
        """Counts a finished iteration of ``images`` images."""
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
        """Ends a trace in progress."""
        if self._torch is not None:
            self._torch.stop()
            self._torch = None

    def record(self) -> dict[str, Any]:
        """Figures for a log line: seconds by region since the previous line, memory, utilisation, energy so far.

        Waits for the device.
        """
        totals = self.regions.totals()
        since = {name: value - self._logged.get(name, 0.0) for name, value in totals.items()}
        self._logged = totals
        record: dict[str, Any] = {"profile_seconds": since, "peak_memory_bytes": peak_memory_bytes(self.device)}
        if self.joules is not None:
            record |= {"energy_joules": self.joules, "gpu_utilization": self.meter.utilization()}
        return record

    def summary(self, all_joules: float | None = None) -> dict[str, Any]:
        """Figures over all measured iterations. ``all_joules`` is the energy of the GPUs of all processes."""
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
        """Milliseconds per iteration and share of time for each region; time outside all regions is the row "other"."""
        summary = self.summary(all_joules)
        totals = summary["seconds_by_region"]
        totals["other"] = max(0.0, self.seconds - sum(totals.values()))
        width = max(len(name) for name in [*totals, "iteration"])
        lines = [f"{'':{width}} {'ms/iteration':>13} {'share':>7}"]
        for name, value in [*totals.items(), ("iteration", self.seconds)]:
            share = value / self.seconds if self.seconds else 0.0
            lines.append(f"{name:{width}} {1e3 * value / max(1, self.iterations):13.2f} {share:7.1%}")
        energy = summary["joules_per_image"]
        joules = f"energy not measured ({self.meter.missing})" if energy is None else f"{energy:.3g} J/image"
        lines.append(
            f"{self.iterations} iterations; {summary['images_per_second']:.1f} images/s; {joules}; "
            f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB"
        )
        if self.outside_seconds:
            between = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.outside_seconds.items())
            lines.append(f"beside the iterations: {between}")
        return "\n".join(lines)
