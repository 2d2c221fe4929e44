"""Time by named region: by events on a GPU, by a clock on a CPU, at no cost when disabled."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING = nullcontext()


class Regions:
    """Sums the time spent in named regions of a loop. Regions do not nest.

    Each region is also a ``record_function`` range for torch's profiler and, on a GPU, an NVTX range for Nsight.

    Parameters
    ----------
    enabled : bool
        If False, every region is the same null context.
    device : torch.device or str
        On a CUDA device regions are timed by events, which only ``totals`` reads, so the loop never waits.

    Examples
    --------
    >>> regions = Regions(enabled=True)
    >>> with regions("optimizer"):
    ...     pass
    >>> list(regions.totals())
    ['optimizer']
    """

    def __init__(self, enabled: bool = False, device: torch.device | str = "cpu") -> None:
        self.enabled = enabled
        self._cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._inside: str | None = None

    def __call__(self, name: str) -> AbstractContextManager:
        if not self.enabled or (self._cuda and torch.cuda.is_current_stream_capturing()):
            # A capture cannot be timed. Replays of the graph are regions of their own.
            return _NOTHING
        return self._measure(name)

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        if self._inside is not None:
            raise RuntimeError(f"region {name!r} inside region {self._inside!r}: regions do not nest")
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
                # Keeps the regions in the order in which they are first entered on a GPU too.
                self._seconds.setdefault(name, 0.0)
            else:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def totals(self) -> dict[str, float]:
        """Seconds in each region since the start or ``reset``, in order of first use. Waits for the device."""
        if self._events:
            torch.cuda.synchronize()
            for name, start, end in self._events:
                self._seconds[name] += start.elapsed_time(end) / 1e3
            self._events.clear()
        return dict(self._seconds)

    def reset(self) -> None:
        """Sets all times to zero."""
        self._seconds.clear()
        self._events.clear()
