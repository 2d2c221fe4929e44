"""Models that have forgotten a concept, in one table: means and spreads, and the figures of each run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from .across import cell_of, own_reports
from .blocks import Code, Picture, Section, Table, Text, figures_table
from .files import Run, write_csv
from .places import portable
from .render import write_document
from .tables import text_table_of

# What a row has: key in metrics.json, title, format, and what it says.
COLUMNS = (
    ("no_face_share", "no face", "{:.3f}", "images of the concept's prompts without a face, over all"),
    ("gcd_score", "GCD", "{:.3f}", "mean of the likeliest face's probability to be the celebrity, where there is one"),
    ("near_no_face_share", "near no face", "{:.3f}", "the same for other celebrities, who are to stay"),
    ("near_gcd_score", "near GCD", "{:.3f}", "mean probability to be the celebrity who was asked for"),
    ("inappropriate_probability", "unsafe %", "{:.2f}", "images that a detector calls unsafe"),
    ("max_expected_inappropriateness", "max expected %", "{:.2f}", "the worst of 25 prompts, over 10,000 draws"),
    ("near_inappropriate_probability", "near unsafe %", "{:.2f}", "the same share for clothed people"),
    ("clip_score", "CLIP", "{:.2f}", "how well images of the concept's prompts fit these: to fall"),
    ("near_clip_score", "near CLIP", "{:.2f}", "how well images of near concepts fit their prompts: to stay"),
    ("coco_clip_score", "captions CLIP", "{:.2f}", "how well images of captions fit these: to stay"),
    ("fid", "FID", "{:.2f}", "of images of captions, from the real images"),
    ("sampling_steps", "steps", "{:.0f}", "evaluations of the network an image"),
    ("images", "images", "{:.0f}", "images of the training"),
    ("seconds", "seconds", "{:.0f}", "of training"),
)


def _rows(runs: Mapping[str, Sequence[Run]], facts: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """Rows of cells, the head first; columns in which no run has anything are left out."""
    there = {key for of in runs.values() for run in of for key, value in run.metrics.items() if value is not None}
    columns = [column for column in COLUMNS if column[0] in there]
    titles = list(next(iter(facts.values()), {}))
    rows = [["method", *titles, *(title for _, title, *_ in columns)]]
    for name, several in runs.items():
        cells = [cell_of([run.metrics.get(key) for run in several], form) for key, _, form, _ in columns]
        rows.append([name, *facts[name].values(), *cells])
    return rows


def concept_table(runs: Mapping[str, Sequence[Run]]) -> str:
    """The table, of fixed width."""
    return text_table_of(_rows(runs, {name: {} for name in runs}))


def write_concepts(
    folder: Path,
    runs: Mapping[str, Sequence[Run]],
    *,
    asked: str,
    command: str,
    facts: Mapping[str, Mapping[str, str]],
    pictures: Sequence[tuple[str, str]] = (),
) -> Path:
    """report.md, report.html, compare.csv (a line a run) and compare.json; returns report.md's path.

    Parameters
    ----------
    runs: method to its runs, one a seed.
    asked: what was to be forgotten, a sentence. command: that makes these runs.
    facts: method to further columns, title to text; the same titles for all.
    pictures: file in the folder and what it shows.
    """
    folder = Path(folder)
    keys = [key for key, *_ in COLUMNS]
    lines: list[list[Any]] = [["method", "seed", *keys]]
    for name, several in runs.items():
        lines += [[name, run.metrics.get("seed"), *(run.metrics.get(key) for key in keys)] for run in several]

    write_csv(folder / "compare.csv", lines)
    found = {"command": command, "methods": {name: [run.metrics for run in of] for name, of in runs.items()}}
    write_json(folder / "compare.json", portable(found))
    rows = _rows(runs, facts)
    shown = [(title, meaning) for _, title, _, meaning in COLUMNS if title in rows[0]]
    result = [
        Text(asked),
        Text("Mean ± sample standard deviation over seeds of the training. Made by"),
        Code(command),
        figures_table(rows),
        Table(("column", "what it says"), shown, "ll"),
        Text(
            "Prompts, detectors, thresholds and versions: evaluation.json in the folder of each run. What is forgotten "
            "on these prompts may come back on others."
        ),
    ]
    sections = [Section("Result", result)]
    if pictures:
        sections.append(Section("Images", [Picture(file, said, said) for file, said in pictures]))
    return write_document(folder, "Concept forgotten", [*sections, *own_reports(folder, runs)])
