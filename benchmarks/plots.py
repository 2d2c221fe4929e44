"""The roofline of a benchmark run: time per parameter against the minimum of bytes per parameter.

``python -m pecker_fast.benchmarks.plots results.json plot.png``
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .registry import OURS
from .report import describe_conditions
from .run import load


def points(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of the roofline: for each (operation, size, dtype, threads, alternative) with a floor in bytes, that
    floor and the picoseconds a parameter. If several rows have the alternative, the fastest median counts."""
    fastest: dict[tuple, dict[str, Any]] = {}
    for row in results["rows"]:
        for name, floor in row.get("floor_bytes", {}).items():
            time = 1e12 * row["seconds"][name]["p50"] / row["numel"]
            key = row["op"], row["size"], row["dtype"], row["threads"], name
            if key not in fastest or time < fastest[key]["picoseconds"]:
                labels = dict(zip(("op", "size", "dtype", "threads", "name"), key, strict=True))
                fastest[key] = {**labels, "floor": floor, "picoseconds": time, "ours": not _is_rival(name)}
    return list(fastest.values())


def _is_rival(name: str) -> bool:
    return "torch" in name or "foreach" in name or "separate" in name


def copy_speed(results: dict[str, Any]) -> float | None:
    """Median GB/s of the copies that were timed in the run; None without copies."""
    speeds = sorted(row["copy_gb_per_s"] for row in results["rows"] if "copy_gb_per_s" in row)
    return speeds[len(speeds) // 2] if speeds else None


def draw_roofline(results: dict[str, Any], path: str | os.PathLike) -> None:
    """A picture, log-log, one panel for each size, dtype and number of threads, with the copy's speed as a line.

    Raises ValueError if no result has a floor, ImportError if matplotlib is missing.
    """
    found = points(results)
    if not found:
        raise ValueError("the results have no floors in bytes: there is nothing to draw")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'pecker-fast[train]'") from error
    panels = list(dict.fromkeys((p["size"], p["dtype"], p["threads"]) for p in found))
    figure = Figure(figsize=(6.5 * len(panels), 6), layout="constrained")
    speed = copy_speed(results)
    for place, key in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        here = [p for p in found if (p["size"], p["dtype"], p["threads"]) == key]
        for ours, colour, label in ((True, "tab:blue", "pecker_fast"), (False, "tab:orange", "others")):
            some = [p for p in here if p["ours"] == ours]
            axes.scatter([p["floor"] for p in some], [p["picoseconds"] for p in some], s=18, c=colour, label=label)
        ours = sorted((p for p in here if p["ours"]), key=lambda p: (round(p["floor"], 1), p["picoseconds"]))
        # Points with the same floor lie above each other, so their names alternate between the sides.
        for i, p in enumerate(ours):
            side, shift = ("left", 5) if i % 2 else ("right", -5)
            name = f"{p['op']} {p['name'].removeprefix(OURS)}".strip()
            at = (p["floor"], p["picoseconds"])
            axes.annotate(name, at, fontsize=6, ha=side, va="center", xytext=(shift, 0), textcoords="offset points")
        ends = [0.25 * min(p["floor"] for p in here), 3 * max(p["floor"] for p in here)]
        if speed is not None:
            axes.plot(ends, [1000 * x / speed for x in ends], "k-", linewidth=1, label=f"copy, {speed:.3g} GB/s")
            axes.plot(ends, [1000 * x / speed / 0.85 for x in ends], "k:", linewidth=1, label="85 % of it")
        size, dtype, threads = key
        axes.set(xscale="log", yscale="log", xlim=ends, xlabel="least bytes a parameter")
        axes.set(title=f"{size}, {dtype}" + ("" if threads is None else f", threads: {threads}"))
        axes.set_ylabel("picoseconds a parameter")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(textwrap.fill(describe_conditions(results["conditions"]), 110 * len(panels)), fontsize=7)
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="roofline plot of benchmark results")
    parser.add_argument("results", help="JSON file that pecker-fast bench --json wrote")
    parser.add_argument("plot", help="picture to write")
    given = parser.parse_args(arguments)
    try:
        draw_roofline(load(given.results), Path(given.plot))
    except (OSError, ValueError, ImportError) as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
