"""What the ablation writes: tables with intervals, plots, and the figures of every run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pecker_fast.figures import Figure
from pecker_fast.files import write_json, write_text
from pecker_fast.metrics.intervals import Interval, interval
from pecker_fast.report.blocks import Code, Picture, Section, Table, Text, figures_table
from pecker_fast.report.files import write_csv
from pecker_fast.report.render import write_document
from pecker_fast.report.tables import meanings_table

from .ablation import COST, FIGURES, TIME, AblationRun, Results, pooled
from .ablation_plots import draw_curves, draw_frontier


def _mean(value: Interval | None, column: Figure) -> str:
    return "-" if value is None else value.text(column.number)


def _difference(value: Interval | None, column: Figure) -> str:
    """A difference, with a star if its interval excludes 0."""
    if value is None:
        return "-"
    return value.text(lambda x: column.number(x, signed=True)) + (" *" if value.side else "")


def _titles(keys: Sequence[str]) -> list[str]:
    return [FIGURES[key].title for key in keys]


def _means(results: Results, keys: Sequence[str]) -> Table:
    rows = [["condition", "seeds", *_titles(keys)]]
    for name, several in results.by_condition.items():
        cells = []
        for key in keys:
            mean = results.mean(name, key)
            never = f"; {mean.censored} never" if key == TIME and mean is not None and mean.censored else ""
            cells.append(_mean(mean, FIGURES[key]) + never)
        rows.append([name, str(len(several)), *cells])
    return figures_table(rows)


def _differences(results: Results) -> Table:
    keys = (TIME, "ua_fluctuation", "retain_accuracy", COST, "drift", "cover_frechet_distance")
    rows = [["condition", *_titles(keys), f"Fréchet minus {results.reference}'s"]]
    rows[0] += ["Fréchet over the frontier", "image drift over it", "sooner than all"]
    for name in results.by_condition:
        if name == results.reference:
            continue
        cells = [
            "-" if name == results.default else _difference(results.against_default(name, key), FIGURES[key])
            for key in keys
        ]
        cells.append(_difference(results.against_reference(name), FIGURES[COST]))
        for key in (COST, "drift"):
            cells.append(_difference(interval(list(results.excess_of_seeds(name, key).values())), FIGURES[key]))
        count = len(results.by_condition[name])
        rows.append([name, *cells, f"{results.faster_than_frontier(name)} of {count}"])
    return figures_table(rows, f"minus {results.default} on the same seed")


def _pooled(several: Sequence[Results], default: str) -> Table:
    common = [name for name in several[0].by_condition if all(name in of.by_condition for of in several)]
    keys = (TIME, COST, "drift", "cover_frechet_distance")
    rows = [["condition", "runs", *_titles(keys), "Fréchet over the frontier", "image drift over it"]]
    for name in common:
        if name == several[0].reference:
            continue
        cells = [
            "-" if name == default else _difference(pooled(several, name, default, key), FIGURES[key]) for key in keys
        ]
        for key in (COST, "drift"):
            values = [value for of in several for value in of.excess_of_seeds(name, key).values()]
            cells.append(_difference(interval(values), FIGURES[key]))
        rows.append([name, str(sum(len(of.by_condition[name]) for of in several)), *cells])
    return figures_table(rows)


def write_ablation(
    folder: Path,
    runs: Sequence[AblationRun],
    *,
    asked: str,
    command: str,
    default: str,
    frontier: Sequence[str],
    reference: str,
) -> Path:
    """Writes report.md, report.html, frontier.png, curves.png, summary.json, runs.csv and runs.jsonl.

    ``read_ablation`` reads runs.jsonl.

    Parameters
    ----------
    folder : Path
    runs : sequence of AblationRun
        In the order of the tables.
    asked : str
        The question.
    command : str
        The command that makes these runs.
    default, frontier, reference
        See ``Results``.

    Returns
    -------
    Path
        Of report.md.
    """
    if not runs:
        raise ValueError("runs is empty, expected at least one run that has ended")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places = dict.fromkeys((run.preset, run.pair) for run in runs)
    results = {
        place: Results([run for run in runs if (run.preset, run.pair) == place], default, frontier, reference)
        for place in places
    }
    _write_runs(folder, runs)
    summary = {
        "command": command,
        "default": default,
        "frontier": list(frontier),
        "pairs": [
            {"preset": preset, "pair": pair, "conditions": [of.row(name) for name in of.by_condition]}
            for (preset, pair), of in results.items()
        ],
    }
    write_json(folder / "summary.json", summary)
    draw_frontier({f"{preset}, {pair}": of for (preset, pair), of in results.items()}, folder / "frontier.png")
    first = next(iter(results.values()))
    draw_curves(first, folder / "curves.png")
    question = [
        Text(asked),
        Text("Command:"),
        Code(command),
        Text(
            "Means with 95 % t intervals over the seeds. A star marks differences whose interval leaves 0 out; one "
            "interval in twenty does so by chance."
        ),
    ]
    sections = [Section("Question", question)]
    for (preset, pair), of in results.items():
        tables = [
            _means(of, [TIME, "ua", "ua_fluctuation", "retain_accuracy", COST, "diversity"]),
            _means(
                of, ["cover_frechet_distance", "cover_diversity", "drift", "parameter_change", "reached", "mask_iou"]
            ),
            _differences(of),
        ]
        sections.append(Section(f"{preset}, {pair.replace('-', ' forgotten, with cover ')}", tables))
    if len(results) > 1:
        pairs = _pooled(list(results.values()), default)
        sections.append(Section(f"All pairs together, minus {default}", [pairs]))
    notes = (
        f"{FIGURES[TIME].label}: ≥ if the UA of some seeds never stayed there; the length of their run counts.",
        f"The frontier is that of {', '.join(frontier)} on the same seed. Over the frontier: the figure minus the "
        "frontier's after the same number of images to UA 98. The frontier is linear between the points that no other "
        "point beats in both figures, and constant beyond them. Below 0 is better than the frontier.",
        "Sooner than all: seeds on which UA 98 comes before every setting of the frontier.",
    )
    sections.append(Section("Columns", [meanings_table(FIGURES.values()), *map(Text, notes)]))
    pictures = [
        Picture("frontier.png", "Images to UA 98 against the Fréchet distance of the retained classes"),
        Picture("curves.png", "UA and Fréchet distance of the retained classes over the training, a column a factor"),
    ]
    return write_document(folder, "Ablation", [*sections, Section("Pictures", pictures)])


def _write_runs(folder: Path, runs: Sequence[AblationRun]) -> None:
    lines = "".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs)
    write_text(folder / "runs.jsonl", lines)
    table: list[list[Any]] = [["preset", "pair", "condition", "seed", *FIGURES]]
    for run in runs:
        cells = (run.figures.get(key) for key in FIGURES)
        cells = (None if cell is None else f"{cell:.6g}" for cell in cells)
        table.append([run.preset, run.pair, run.condition, run.seed, *cells])
    write_csv(folder / "runs.csv", table)
