"""The demo's report of several methods on one request, and the table that the command line prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_json
from .blocks import Block, Link, Picture, Section, Table, Text
from .curves import draw_comparison
from .files import Run
from .places import portable
from .render import write_document
from .run_report import GRIDS, mask_blocks
from .tables import text_table_of
from .words import CAUTION, MAIN, ROWS, asked, number


def comparison_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a method: forgetting, what is kept, time. Fixed width; "-" for what was not measured."""
    head = ("method", "UA %", "retained %", "Fréchet", "/ real", "diversity", "seconds")
    rows = [head]
    for name, found in metrics.items():
        distance, split = found.get("frechet_distance"), found.get("frechet_real_split")
        ratio = "-" if distance is None or not split else f"{distance / split:.2f}x"
        rows.append(
            (
                name,
                number(found, "ua", "{:.1f}"),
                number(found, "retain_accuracy", "{:.1f}"),
                number(found, "frechet_distance", "{:.2f}"),
                ratio,
                number(found, "diversity", "{:.2f}"),
                number(found, "seconds", "{:.0f}"),
            )
        )
    return text_table_of(rows)


def write_comparison(folder: Path, runs: Mapping[str, Path]) -> Path:
    """report.md, report.html, report.png and compare.json of several runs on one preset and seed; returns report.md's
    path.

    ``runs``: name to folder, in the order of the rows; folders below ``folder`` are linked and their samples shown.
    """
    folder = Path(folder)
    read = {name: Run.read(path) for name, path in runs.items()}
    draw_comparison(read, folder / "report.png")
    first = next(iter(read.values()))
    compared = {
        "preset": first.config.get("preset"),
        "seed": first.metrics.get("seed"),
        "methods": {name: run.metrics for name, run in read.items()},
    }
    write_json(folder / "compare.json", portable(compared))
    kept = [r for r in ROWS if r[0] in MAIN or any(run.metrics.get(r[0]) is not None for run in read.values())]
    rows = [(key, *(number(run.metrics, key, form) for run in read.values()), meaning) for key, form, meaning in kept]
    table = Table(("figure", *read, "meaning"), rows, "l" + "r" * len(read) + "l")
    curves = Picture("report.png", "Curves of what was measured, a colour a method")
    request = Text(asked({**portable(first.config), "method": ", ".join(read)}))
    sections = [Section("Result", [request, table, Text(CAUTION), curves])]
    for name, run in read.items():
        blocks: list[Block] = mask_blocks(run)
        if run.folder.is_relative_to(folder):
            place = run.folder.relative_to(folder).as_posix()
            blocks.append(Link("The run's own report", f"{place}/report"))
            if (run.folder / GRIDS).is_file():
                grid = Picture(f"{place}/{GRIDS}", f"Samples of every class before and after {name}, a row a class")
                blocks.insert(0, grid)
        sections.append(Section(name, blocks))
    return write_document(folder, "Forgetting a class of handwritten digits", sections)
