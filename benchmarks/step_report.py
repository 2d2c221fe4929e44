"""Tables and the plot of ``train_step``'s results.

``python -m pecker_fast.benchmarks.step_report results.json [--plot picture.png]`` prints the markdown.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import describe_conditions
from .run import load

HEADER = (
    "network",
    "method",
    "computed in",
    "ms (p20, p50, p80)",
    "images/s",
    "GiB",
    "of matmul rate",
    "rival, ms",
    "rival / ours",
    "over sfd",
    "optimizer",
)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table, with missed bars marked."""
    where = (f"{row['arch']}, batch {row['batch']}", row["method"], row["variant"])
    if "skipped" in row:
        return (*where, "skipped", *[""] * (len(HEADER) - 5), row["skipped"])
    missed = {figure["figure"]: " (missed)" if figure["met"] is False else "" for figure in row["figures"]}
    ms = ", ".join(f"{row['ms'][name]:.1f}" for name in ("p20", "p50", "p80"))
    memory = f"{row['peak_bytes'] / 2**30:.2f}, rival {row['rival_peak_bytes'] / 2**30:.2f}"
    return (
        *where,
        ms,
        f"{row['images_per_second']:.1f}",
        memory + missed["memory / rival"],
        _share(row["of_matmul_rate"]),
        f"{row['rival']['ms']['p50']:.1f} ({row['rival']['precision']})",
        _times(row["speedup"]) + missed["rival / ours"],
        _times(row.get("over_sfd")) + missed.get("pecker / sfd", ""),
        _share(row["optimizer_share"]) + missed["optimizer, selection, average"],
    )


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns for the terminal."""
    table = [HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table)


def markdown(results: dict[str, Any]) -> str:
    """The conditions, the table, and each row's time by phase."""
    lines = [f"Measured on: {describe_conditions(results['conditions'])}.", ""]
    lines.append("| " + " | ".join(HEADER) + " |")
    lines.append("| --- | --- | --- |" + " ---: |" * (len(HEADER) - 3))
    lines += ["| " + " | ".join(cells(row)) + " |" for row in results["rows"]]
    for row in results["rows"]:
        if "skipped" in row:
            continue
        total = sum(row["phases_seconds"].values())
        parts = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in row["phases_seconds"].items())
        lines += ["", f"{row['arch']} {row['method']} {row['variant']}: {parts}."]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw each row's milliseconds by phase, and the rival's whole iteration. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if "skipped" not in row]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.6 * len(rows)))
    names = list(dict.fromkeys(name for row in rows for name in row["phases_seconds"]))
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    for place, row in enumerate(rows):
        # Phases are measured in separate iterations: scale their shares to the time without a profiler.
        start, total = 0.0, sum(row["phases_seconds"].values())
        for name, seconds in row["phases_seconds"].items():
            width = row["ms"]["p50"] * seconds / total
            axes.barh(place, width, 0.4, start, color=colours[name])
            start += width
        axes.barh(place + 0.35, row["rival"]["ms"]["p50"], 0.2, color="0.7")
    for name in names:
        axes.barh(0, 0, color=colours[name], label=name)
    axes.barh(0, 0, color="0.7", label="rival, all of it")
    axes.set_yticks(range(len(rows)), [f"{row['arch']} {row['method']}\n{row['variant']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms an iteration")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="markdown and plot of train_step's results")
    parser.add_argument("results", help="JSON file that train_step --json wrote")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    args = parser.parse_args(arguments)
    try:
        results = load(args.results)
        print(markdown(results))
        if args.plot is not None:
            plot(results, args.plot)
    except (OSError, ValueError) as error:
        print(f"step_report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
