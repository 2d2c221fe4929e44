"""The demo's report of several methods on one request, and the table that it prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..figures import derived, figure
from ..files import write_json
from .blocks import Block, Caution, Link, Picture, Section, Text
from .cautions import cautions_of
from .curves import draw_comparison
from .files import RunRecord
from .places import portable
from .render import write_document
from .run_report import GRIDS, mask_blocks
from .tables import metrics_table, text_table_of
from .words import asked, caution, class_names, shown_figures

# The columns of the printed table.
COLUMNS = ("ua", "retain_accuracy", "frechet_distance", "frechet_over_real", "diversity", "seconds")


def comparison_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The main figures for a terminal, a row a method; "-" for figures that were not measured."""
    columns = [figure(key) for key in COLUMNS]
    rows = [["method", *(column.title for column in columns)]]
    for name, measured in metrics.items():
        values = derived(measured)
        rows.append([name, *(column.number(values.get(column.key)) for column in columns)])
    return text_table_of(rows)


def write_comparison(folder: Path, runs: Mapping[str, Path]) -> Path:
    """Writes report.md, report.html, report.png and compare.json of several runs on one preset and seed.

    Parameters
    ----------
    folder : Path
    runs : mapping of str to Path
        Name to folder, in the order of the rows. Folders below ``folder`` are linked and their samples shown.

    Returns
    -------
    Path
        Of report.md.
    """
    folder = Path(folder)
    read = {name: RunRecord.read(path) for name, path in runs.items()}
    drawn = draw_comparison(read, folder / "report.png")
    first = next(iter(read.values()))
    compared = {
        "preset": first.config.get("preset"),
        "seed": first.metrics.get("seed"),
        "methods": {name: run.metrics for name, run in read.items()},
    }
    write_json(folder / "compare.json", portable(compared))
    table = metrics_table(shown_figures(*read.values()), {name: run.metrics for name, run in read.items()})
    curves = Picture("report.png", "Curves of the figures over the training, one colour for each method")
    request = Text(asked({**portable(first.config), "method": ", ".join(read)}, class_names(first)))
    warnings = [Caution(text) for text in cautions_of({name: [run] for name, run in read.items()})]
    result: list[Block] = [request, *warnings, table, Text(caution(first)), *([curves] if drawn else [])]
    sections = [Section("Result", result)]
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
