"""What the ablation writes: tables with intervals, plots, and the figures of every run."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pecker_fast.files import write_json, write_text
from pecker_fast.report.blocks import Code, Picture, Section, Table, Text, figures_table
from pecker_fast.report.files import write_csv
from pecker_fast.report.render import write_document

from .ablation import COST, FIGURES, TIME, AblationRun, Results, pooled
from .ablation_plots import draw_curves, draw_frontier
from .intervals import Interval, interval


def _text(found: Interval | None, form: str) -> str:
    return "-" if found is None else found.text(form)


def _judged(found: Interval | None, form: str) -> str:
    """A difference, and whether its interval leaves 0 out."""
    return _text(found, form) + ("" if found is None or not found.side else " *")


def _means(results: Results, keys: Sequence[str]) -> Table:
    shown = [figure for figure in FIGURES if figure[0] in keys]
    rows = [["condition", "seeds", *(title for _, title, *_ in shown)]]
    for name, several in results.by_condition.items():
        cells = []
        for key, _, form, _ in shown:
            found = results.mean(name, key)
            never = f"; {found.censored} never" if key == TIME and found is not None and found.censored else ""
            cells.append(_text(found, form) + never)
        rows.append([name, str(len(several)), *cells])
    return figures_table(rows)


def _differences(results: Results) -> Table:
    keys = (TIME, "ua_fluctuation", "retain_accuracy", COST, "drift", "cover_frechet_distance")
    shown = [figure for figure in FIGURES if figure[0] in keys]
    rows = [["condition", *(title for _, title, *_ in shown), f"Fréchet less {results.reference}'s"]]
    rows[0] += ["Fréchet over the frontier", "drift over it", "sooner than all"]
    for name in results.by_condition:
        if name == results.reference:
            continue
        cells = [
            "-" if name == results.default else _judged(results.against_default(name, k), f) for k, _, f, _ in shown
        ]
        cells.append(_judged(results.against_reference(name), "{:+.3f}"))
        over = [_judged(interval(list(results.excess_of_seeds(name, k).values())), "{:+.3f}") for k in (COST, "drift")]
        count = len(results.by_condition[name])
        rows.append([name, *cells, *over, f"{results.faster_than_frontier(name)} of {count}"])
    return figures_table(rows, f"less {results.default} on the same seed")


def _pooled(several: Sequence[Results], default: str) -> Table:
    common = [name for name in several[0].by_condition if all(name in of.by_condition for of in several)]
    keys = (TIME, COST, "drift", "cover_frechet_distance")
    shown = [figure for figure in FIGURES if figure[0] in keys]
    rows = [["condition", "runs", *(title for _, title, *_ in shown), "Fréchet over the frontier", "drift over it"]]
    for name in common:
        if name == several[0].reference:
            continue
        cells = ["-" if name == default else _judged(pooled(several, name, default, k), f) for k, _, f, _ in shown]
        for key in (COST, "drift"):
            values = [value for of in several for value in of.excess_of_seeds(name, key).values()]
            cells.append(_judged(interval(values), "{:+.3f}"))
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
    """report.md, report.html, frontier.png, curves.png, runs.csv, runs.jsonl (which ``read_ablation`` reads) and
    summary.json; returns report.md's path.

    Parameters
    ----------
    runs: that have ended, in the order of the tables.
    asked: the question. command: that makes these runs.
    default, frontier, reference: see ``Results``.
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
        Text("Made by"),
        Code(command),
        Text(
            "Means with 95 % t intervals over seeds. In differences * marks intervals that leave 0 out; of many such "
            "intervals one in twenty does so by chance."
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
        sections.append(Section(f"All pairs together, less {default}", [pairs]))
    meanings = [(title, meaning) for _, title, _, meaning in FIGURES]
    over = (
        f"Frontier: of {', '.join(frontier)} on the same seed; over the frontier: the figure less the frontier's at "
        "the same images to UA 98, linear between those of its points that none is better than in both, level beyond "
        "them. Below 0 is better than the frontier."
    )
    sooner = "Sooner than all: seeds on which UA 98 comes before every setting of the frontier."
    sections.append(Section("Columns", [Table(("column", "what it says"), meanings, "ll"), Text(over), Text(sooner)]))
    pictures = [
        Picture("frontier.png", "Images to UA 98 against the retained Fréchet distance, means with intervals"),
        Picture("curves.png", "UA and the retained Fréchet distance against images seen, a column a factor"),
    ]
    return write_document(folder, "Ablation", [*sections, Section("Pictures", pictures)])


def _write_runs(folder: Path, runs: Sequence[AblationRun]) -> None:
    lines = "".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs)
    write_text(folder / "runs.jsonl", lines)
    keys = [key for key, *_ in FIGURES]
    table: list[list[Any]] = [["preset", "pair", "condition", "seed", *keys]]
    for run in runs:
        cells = (run.figures.get(key) for key in keys)
        cells = (None if cell is None else f"{cell:.6g}" for cell in cells)
        table.append([run.preset, run.pair, run.condition, run.seed, *cells])
    write_csv(folder / "runs.csv", table)
