"""What ``pecker-fast ablate`` writes: tables with intervals, plots, and the figures of every run."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from .ablation import COST, FIGURES, TIME, AblationRun, Results, pooled
from .ablation_plots import draw_curves, draw_frontier
from .files import write_file
from .intervals import Interval, interval


def _text(found: Interval | None, form: str) -> str:
    return "-" if found is None else found.text(form)


def _judged(found: Interval | None, form: str) -> str:
    """A difference, and whether its interval leaves 0 out."""
    return _text(found, form) + ("" if found is None or not found.side else " *")


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in body), ""]


def _means(results: Results, keys: Sequence[str]) -> list[str]:
    shown = [figure for figure in FIGURES if figure[0] in keys]
    rows = [["", "seeds", *(title for _, title, *_ in shown)]]
    for name, several in results.by_condition.items():
        cells = []
        for key, _, form, _ in shown:
            found = results.mean(name, key)
            never = f"; {found.censored} never" if key == TIME and found is not None and found.censored else ""
            cells.append(_text(found, form) + never)
        rows.append([name, str(len(several)), *cells])
    return _markdown(rows)


def _differences(results: Results) -> list[str]:
    keys = (TIME, "ua_fluctuation", "retain_accuracy", COST, "drift", "cover_frechet_distance")
    shown = [figure for figure in FIGURES if figure[0] in keys]
    rows = [["", *(title for _, title, *_ in shown), f"Fréchet less {results.reference}'s"]]
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
    return _markdown(rows)


def _pooled(several: Sequence[Results], default: str) -> list[str]:
    common = [name for name in several[0].by_condition if all(name in of.by_condition for of in several)]
    keys = (TIME, COST, "drift", "cover_frechet_distance")
    shown = [figure for figure in FIGURES if figure[0] in keys]
    rows = [["", "runs", *(title for _, title, *_ in shown), "Fréchet over the frontier", "drift over it"]]
    for name in common:
        if name == several[0].reference:
            continue
        cells = ["-" if name == default else _judged(pooled(several, name, default, k), f) for k, _, f, _ in shown]
        for key in (COST, "drift"):
            values = [value for of in several for value in of.excess_of_seeds(name, key).values()]
            cells.append(_judged(interval(values), "{:+.3f}"))
        rows.append([name, str(sum(len(of.by_condition[name]) for of in several)), *cells])
    return _markdown(rows)


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
    """report.md, frontier.png, curves.png, runs.csv, runs.jsonl (which ``read_ablation`` reads) and summary.json.

    Returns report.md's path.

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
    write_file(folder / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    draw_frontier({f"{preset}, {pair}": of for (preset, pair), of in results.items()}, folder / "frontier.png")
    first = next(iter(results.values()))
    draw_curves(first, folder / "curves.png")
    text = ["# Ablation", "", asked, "", "Made by", "", f"    {command}", ""]
    text += ["Means with 95 % t intervals over seeds. In differences * marks intervals that leave 0 out; of many such"]
    text += ["intervals one in twenty does so by chance.", ""]
    for (preset, pair), of in results.items():
        text += [f"## {preset}, {pair.replace('-', ' forgotten, with cover ')}", ""]
        text += _means(of, [TIME, "ua", "ua_fluctuation", "retain_accuracy", COST, "diversity"])
        text += _means(
            of, ["cover_frechet_distance", "cover_diversity", "drift", "parameter_change", "reached", "mask_iou"]
        )
        text += [f"Less `{default}` on the same seed:", "", *_differences(of)]
    if len(results) > 1:
        text += [f"## All pairs together, less `{default}`", "", *_pooled(list(results.values()), default)]
    text += [f"* {title}: {meaning}." for _, title, _, meaning in FIGURES]
    text += [
        f"* Frontier: of {', '.join(frontier)} on the same seed; over the frontier: the figure less the frontier's at "
        "the same images to UA 98 (linear between its points, level beyond them). Below 0 is better than the frontier.",
        "* Sooner than all: seeds on which UA 98 comes before every setting of the frontier.",
        "",
        "![frontier](frontier.png)",
        "",
        "![curves](curves.png)",
        "",
    ]
    write_file(folder / "report.md", lambda path: path.write_text("\n".join(text)))
    return folder / "report.md"


def _write_runs(folder: Path, runs: Sequence[AblationRun]) -> None:
    lines = "".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs)
    write_file(folder / "runs.jsonl", lambda path: path.write_text(lines))
    keys = [key for key, *_ in FIGURES]
    head = ["preset", "pair", "condition", "seed", *keys]

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            for run in runs:
                cells = (run.figures.get(key) for key in keys)
                row = [run.preset, run.pair, run.condition, run.seed]
                writer.writerow(row + ["" if cell is None else f"{cell:.6g}" for cell in cells])

    write_file(folder / "runs.csv", write_csv)
