"""Tables of results: text for the terminal, markdown for the README.

``python -m pecker_fast.benchmarks.report results.json ... --readme README.md`` writes the markdown between the two
marker comments of that file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .run import load

MARKERS = ("<!-- benchmarks:begin -->", "<!-- benchmarks:end -->")


def number(value: float, unit: str = "x") -> str:
    """Two or three significant digits and the unit."""
    digits = f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    if unit == "":
        return f"{100 * value:.1f}%"
    if unit != "x":
        return f"{value:.4f}{unit}" if unit == " B" else f"{value:.4g}{unit}"
    return digits + unit


def target(row: dict[str, Any], key: str) -> str:
    """A bar or an aim with its direction, empty if there is none."""
    if row.get(key) is None:
        return ""
    return f"{'≤' if row['at_most'] else '≥'} {number(row[key], row['unit'])}"


def verdict(row: dict[str, Any]) -> str:
    return {True: "met", False: "MISSED", None: ""}[row.get("met")]


def times(row: dict[str, Any]) -> str:
    """Median milliseconds of the two alternatives, numerator first."""
    return " / ".join(f"{1000 * timing['p50']:.3g} ms" for timing in row.get("seconds", {}).values())


def bandwidth(row: dict[str, Any]) -> str:
    """GB/s by floor bytes of the first alternative that has a floor, and the copy's if it was timed beside."""
    speeds = [f"{speed:.3g} GB/s" for speed in list(row.get("floor_gb_per_s", {}).values())[:1]]
    if "copy_gb_per_s" in row:
        speeds.append(f"copy {row['copy_gb_per_s']:.3g} GB/s")
    return ", ".join(speeds)


HEADER = ("size", "dtype", "threads", "figure", "measured", "bar", "", "times", "by floor bytes")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    threads = "" if row["threads"] is None else str(row["threads"])
    labels = (row["size"], row["dtype"], threads, row["figure"])
    if "skipped" in row:
        return (*labels, "skipped", "", "", row["skipped"], "")
    return (*labels, number(row["number"], row["unit"]), target(row, "bar"), verdict(row), times(row), bandwidth(row))


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """Columns for the terminal."""
    table = [HEADER, *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def describe_conditions(conditions: dict[str, Any]) -> str:
    """One sentence on machine, versions and method."""
    packages = conditions["packages"]
    parts = [
        f"{conditions['device']} ({conditions['cpu_cores']} CPU cores, "
        f"{conditions['cpu_instruction_set'] or 'no compiled'} kernels)",
        f"Python {conditions['python']}",
        f"torch {packages['torch']}",
        f"numpy {packages['numpy']}",
        f"commit {conditions['commit'] or 'unknown'}",
        conditions["time_utc"][:10],
        conditions["method"],
    ]
    return ", ".join(parts)


def markdown(results: dict[str, Any]) -> str:
    """Markdown: the conditions, and a table with one row a figure and one column for each number of threads."""
    rows = [row for row in results["rows"] if "skipped" not in row]
    columns = sorted({(row["device"], row["threads"]) for row in rows}, key=lambda column: column[1] or 0)

    def title(device: str, threads: int | None) -> str:
        return device if threads is None else f"{threads} thread{'s' if threads > 1 else ''}"

    groups: dict[tuple, dict] = {}
    for row in rows:
        key = (row["size"], row["dtype"], row["figure"])
        groups.setdefault(key, {})[row["device"], row["threads"]] = row
    lines = [f"Measured on: {describe_conditions(results['conditions'])}.", ""]
    kinds = list(dict.fromkeys((size, dtype) for size, dtype, _ in groups))
    for size, dtype in kinds:
        numel = next(row["numel"] for row in rows if row["size"] == size)
        lines += [f"`{size}`: {numel:,} parameters, {dtype}", ""]
        lines.append("| figure | " + " | ".join(title(*column) for column in columns) + " | bar | aim |")
        lines.append("| --- |" + " ---: |" * len(columns) + " --- | --- |")
        for (row_size, row_dtype, figure), by_column in groups.items():
            if (row_size, row_dtype) != (size, dtype):
                continue
            shown = []
            for column in columns:
                row = by_column.get(column)
                missed = row is not None and row.get("met") is False
                value = "" if row is None else number(row["number"], row["unit"])
                shown.append(value + (" (missed)" if missed else ""))
            any_row = next(iter(by_column.values()))
            lines.append("| " + " | ".join([figure, *shown, target(any_row, "bar"), target(any_row, "aim")]) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def write_between_markers(path: Path, body: str) -> None:
    """Replaces the text between the two marker lines of a file. Raises ValueError if the file lacks them."""
    text = path.read_text()
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path} needs one line {begin} and after it one line {end}")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    path.write_text(f"{head}{begin}\n{body}\n{end}{tail}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="markdown tables of benchmark results")
    parser.add_argument("results", nargs="+", help="JSON files that pecker-fast bench --json wrote")
    parser.add_argument("--readme", type=Path, help="file to write the tables to, between its two marker comments")
    options = parser.parse_args(arguments)
    try:
        body = "\n".join(markdown(load(path)) for path in options.results)
        if options.readme is None:
            print(body)
        else:
            write_between_markers(options.readme, body)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
