"""Time by named region: events on a GPU, a clock on the CPU, nothing when it is off."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_NOTHING = nullcontext()


class Regions:
    """Adds up the time spent in named regions of a loop; regions do not nest.

    Parameters
    ----------
    enabled: without it every region is one shared null context.
    device: on a CUDA device regions are timed by events, which are only read by ``totals``: the loop never waits.

    Use: ``with regions("optimizer"): ...``; ``totals()`` and ``table(iterations)`` at the end.
    """

    def __init__(self, enabled: bool = False, device: torch.device | str = "cpu") -> None:
        self.enabled = enabled
        self._cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._inside: str | None = None

    def __call__(self, name: str) -> AbstractContextManager:
        return self._measure(name) if self.enabled else _NOTHING

    @contextmanager
    def _measure(self, name: str) -> Iterator[None]:
        if self._inside is not None:
            raise RuntimeError(f"region {name!r} within region {self._inside!r}: regions do not nest")
        self._inside = name
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._inside = None
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if self._cuda:
                events[1].record()
                self._events.setdefault(name, []).append(events)

    def totals(self) -> dict[str, float]:
        """Seconds in each region, in the order in which they were first entered. Waits for the device."""
        if not self._cuda:
            return dict(self._seconds)
        torch.cuda.synchronize()
        return {
            name: sum(start.elapsed_time(end) for start, end in pairs) / 1e3 for name, pairs in self._events.items()
        }

    def table(self, iterations: int, seconds: float) -> str:
        """Milliseconds an iteration and share of ``seconds``, the time of all iterations, for each region.

        What lies in no region is the row "other".
        """
        totals = self.totals()
        totals["other"] = max(0.0, seconds - sum(totals.values()))
        width = max(len(name) for name in totals)
        lines = [f"{'':{width}} {'ms/iteration':>13} {'share':>7}"]
        for name, value in totals.items():
            share = value / seconds if seconds else 0.0
            lines.append(f"{name:{width}} {1e3 * value / max(1, iterations):13.2f} {share:7.1%}")
        lines.append(f"{'iteration':{width}} {1e3 * seconds / max(1, iterations):13.2f} {1:7.1%}")
        return "\n".join(lines)
