"""Time by named region: events on a GPU, a clock on the CPU, nothing when it is off."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING = nullcontext()


class Regions:
    """Adds up the time spent in named regions of a loop; regions do not nest.

    Each is a ``record_function`` range for torch's profiler as well, and on a GPU an NVTX range for Nsight.

    Parameters
    ----------
    enabled: without it every region is one shared null context.
    device: on a CUDA device regions are timed by events, which are only read by ``totals``: the loop never waits.

    Use: ``with regions("optimizer"): ...``; ``totals()`` now and then.
    """

    def __init__(self, enabled: bool = False, device: torch.device | str = "cpu") -> None:
        self.enabled = enabled
        self._cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._inside: str | None = None

    def __call__(self, name: str) -> AbstractContextManager:
        if not self.enabled or (self._cuda and torch.cuda.is_current_stream_capturing()):
            # Within a graph there is nothing to time: its replays are regions of their own.
            return _NOTHING
        return self._measure(name)

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        if self._inside is not None:
            raise RuntimeError(f"region {name!r} within region {self._inside!r}: regions do not nest")
        self._inside = name
        if self._cuda:
            torch.cuda.nvtx.range_push(name)
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            self._inside = None
            if self._cuda:
                events[1].record()
                torch.cuda.nvtx.range_pop()
                self._events.append((name, *events))
                # So that the order of the regions is that of their first time on a GPU too.
                self._seconds.setdefault(name, 0.0)
            else:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def totals(self) -> dict[str, float]:
        """Seconds in each region since the start or ``reset``, in the order in which they were first entered. Waits for
        the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1e3
            self._events.clear()
        return dict(self._seconds)

    def reset(self) -> None:
        """Begins to count anew."""
        self._seconds.clear()
        self._events.clear()
