"""Several methods over several seeds: a table with means and spreads, curves, and the figures of each run."""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from .blocks import Code, Link, Picture, Section, Table, Text, figures_table
from .curves import COLOURS, PANELS, mean_curve, new_figure, points_of, save_figure
from .files import Run, write_csv
from .places import portable
from .render import write_document
from .tables import text_table_of

FORGOTTEN = 98.0
# Of what is measured by the clock.
TIMED = ("seconds", "seconds_per_image")
# What a row has, over the seeds: key, title, format, and what it says.
COLUMNS = (
    ("ua", "UA %", "{:.1f}", "unlearning accuracy at the end"),
    ("ua_last_half_min", "UA, least %", "{:.1f}", "the least of it in the last half of the run"),
    ("retain_accuracy", "retained %", "{:.1f}", "images asked for retained classes that the judge recognises"),
    ("frechet_distance", "Fréchet", "{:.2f}", "distance from the real images of the retained classes"),
    ("frechet_over_real", "/ real", "{:.2f}", "over the distance of as many real images from the others"),
    ("fid", "FID", "{:.2f}", "Fréchet distance of Inception features"),
    ("sfid", "sFID", "{:.2f}", "Fréchet distance of Inception's spatial features"),
    ("is", "IS", "{:.2f}", "Inception score"),
    ("kid", "KID", "{:.5f}", "kernel distance of Inception features"),
    ("precision", "precision", "{:.3f}", "improved precision, k = 3"),
    ("recall", "recall", "{:.3f}", "improved recall, k = 3"),
    ("extractor_precision", "judge precision", "{:.3f}", "improved precision in the judge's features, k = 3"),
    ("extractor_recall", "judge recall", "{:.3f}", "improved recall in the judge's features, k = 3"),
    ("diversity", "diversity", "{:.2f}", "within retained classes, over that of real images"),
    (
        "cover_frechet_distance",
        "cover Fréchet",
        "{:.1f}",
        "of what is drawn for the forgotten class from the cover class",
    ),
    ("cover_diversity", "cover diversity", "{:.2f}", "of what is drawn for the forgotten class"),
    ("images_to_forget", "images to UA 98", "{:.0f}", "images seen until UA stayed at 98 % or more"),
    ("images", "images", "{:.0f}", "images seen in all"),
    ("seconds", "seconds", "{:.0f}", "of training"),
    ("sampling_steps", "steps / image", "{:.0f}", "of the sampler that draws an image"),
    ("seconds_per_image", "s / image", "{:.2g}", "to draw an image of the evaluation"),
    ("peak_memory_gib", "GiB", "{:.2f}", "most memory in use; on a CPU by the process so far"),
    (
        "relearn_forget_ua_50",
        "UA, relearnt %",
        "{:.1f}",
        "the least after 50 steps of fine-tuning on a few forgotten images",
    ),
    (
        "latent_own_confirmed",
        "latents %",
        "{:.1f}",
        "searches for a latent that draws the forgotten class that succeed",
    ),
    (
        "paths_still_most",
        "other samplers %",
        "{:.1f}",
        "the most that is drawn of the forgotten class by another sampler",
    ),
    ("reached", "reached %", "{:.1f}", "parameters that the forget gradient reached at some time"),
    ("parameters_changed", "changed %", "{:.1f}", "parameters that differ at all from where they started"),
    ("drift_norm", "drift", "{:.4f}", "norm of the weights' change over the norm of the weights"),
)

# Key of an evaluation to the title of its panel.
CURVES = {
    **dict(PANELS[:3]),
    "cover_frechet_distance": "Fréchet distance of the forgotten\nclass's images to the cover",
}


def images_to_forget(evaluations: Sequence[Mapping[str, Any]], least: float = FORGOTTEN) -> float | None:
    """Images seen at the first evaluation from which on UA stays at ``least`` percent or more; None where it never
    does."""
    found = None
    for record in evaluations:
        if record.get("ua") is None:
            continue
        if record["ua"] < least:
            found = None
        elif found is None:
            found = record["images"]
    return found


def figures(run: Run) -> dict[str, float | None]:
    """The columns of one run; None where there is nothing."""
    found: dict[str, Any] = {key: run.metrics.get(key) for key, *_ in COLUMNS}
    split = run.metrics.get("frechet_real_split")
    if split and found["frechet_distance"] is not None:
        found["frechet_over_real"] = found["frechet_distance"] / split
    found["images_to_forget"] = images_to_forget(run.evaluations)
    memory = run.metrics.get("peak_memory_bytes")
    found["peak_memory_gib"] = None if memory is None else memory / 2**30
    if found["reached"] is None:
        found["reached"] = run.reached
    return found


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float | None, int] | None:
    """Mean, sample standard deviation (None of fewer than two) and count of what is there; None where nothing is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there)


def cell_of(values: Sequence[float | None], form: str) -> str:
    """Mean and spread of what is there as a cell, "-" where nothing is."""
    found = mean_and_spread(values)
    if found is None:
        return "-"
    mean, spread, count = found
    text = form.format(mean) + ("" if spread is None else f" ± {form.format(spread)}")
    # Of some seeds only: not a mean of the method.
    return text if count == len(values) else f"{text} ({count} of {len(values)})"


def _table(
    runs: Mapping[str, Sequence[Run]], facts: Mapping[str, Mapping[str, str]], seconds: bool = True
) -> list[list[str]]:
    """Rows of cells, the head first; columns in which no run has anything are left out, without ``seconds`` those that
    are measured by the clock too."""
    found = {name: [figures(run) for run in of] for name, of in runs.items()}
    columns = [c for c in COLUMNS if any(f[c[0]] is not None for several in found.values() for f in several)]
    columns = [c for c in columns if seconds or c[0] not in TIMED]
    titles = list(next(iter(facts.values()), {}))
    rows = [["method", *titles, *(title for _, title, *_ in columns)]]
    for name, several in found.items():
        cells = [cell_of([f[key] for f in several], form) for key, _, form, _ in columns]
        rows.append([name, *facts.get(name, {}).values(), *cells])
    return rows


def text_table(runs: Mapping[str, Sequence[Run]], seconds: bool = True) -> str:
    """The main columns, of fixed width."""
    keys = (
        "ua",
        "retain_accuracy",
        "frechet_distance",
        "frechet_over_real",
        "diversity",
        "images_to_forget",
        "seconds",
        "seconds_per_image",
    )
    titles = {title for key, title, *_ in COLUMNS if key in keys}
    rows = _table(runs, {}, seconds)
    kept = [i for i, title in enumerate(rows[0]) if i == 0 or title in titles]
    return text_table_of([[row[i] for i in kept] for row in rows])


def _curves(panel, name: str, several: Sequence[Run], colour: str, key: str, x: str) -> None:
    """Each run by itself, thin, and the mean over the runs wherever all were measured after as many images."""
    curves = [points_of(run.evaluations, x, key) for run in several]
    for curve in filter(None, curves):
        panel.plot(*zip(*curve.values(), strict=True), color=colour, lw=0.7, marker=".", ms=3, alpha=0.5)
    # Without a point it still has its place in the legend.
    mean = mean_curve(curves) or [(math.nan, math.nan)]
    panel.plot(*zip(*mean, strict=True), color=colour, marker="o", markersize=4, label=name)


def draw_across(runs: Mapping[str, Sequence[Run]], path: Path, seconds: bool = True) -> None:
    """UA and what is kept, against images seen and, with ``seconds``, against the time of training."""
    places = [("images", "images seen"), *([("seconds", "seconds of training")] if seconds else [])]
    figure, axes = new_figure(2, len(CURVES) * len(places) // 2)
    for panel, ((x, label), (key, title)) in zip(axes.flat, itertools.product(places, CURVES.items()), strict=True):
        for i, (name, several) in enumerate(runs.items()):
            _curves(panel, name, several, COLOURS[i % len(COLOURS)], key, x)
        panel.set_xlabel(label)
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
        ends = [run.evaluations[-1][x] for several in runs.values() for run in several if run.evaluations]
        # A method that takes many times as long would leave the others no room.
        if ends and max(ends) > 10 * min(ends) > 0:
            panel.set_xscale("log")
        if "frechet" in key:
            panel.set_yscale("log")
        if key in ("ua", "retain_accuracy"):
            panel.set_ylim(-3, 103)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    save_figure(figure, path)


def _drawn(run: Run) -> list[dict[str, Any]]:
    """What the curves and the figures need of a run's evaluations."""
    return [{key: line[key] for key in ("images", "seconds", *CURVES) if key in line} for line in run.evaluations]


def read_across(path: Path) -> tuple[dict[str, list[Run]], dict[str, Any]]:
    """The runs of a compare.json, and what else ``write_across`` takes: "asked", "command" and "facts".

    Raises ValueError where there is no such file, or it is of something else.
    """
    path = Path(path)
    try:
        compared = json.loads(path.read_text())
        said = {key: compared[key] for key in ("asked", "command", "facts")}
        runs = {
            name: [
                Run(path.parent / f"{name}-seed{found['seed']}", {}, found, [], found.pop("evaluations"))
                for found in several
            ]
            for name, several in compared["methods"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"runs is {str(path)!r}, expected compare.json of a comparison: {error!r}") from error
    return runs, said


def write_across(
    folder: Path,
    runs: Mapping[str, Sequence[Run]],
    *,
    asked: str,
    command: str,
    facts: Mapping[str, Mapping[str, str]] | None = None,
    seconds: bool = True,
) -> Path:
    """report.md, report.html, report.png, compare.csv (a line a run) and compare.json, which ``read_across`` reads;
    returns report.md's path.

    Parameters
    ----------
    runs: method to its runs, one a seed.
    asked: what was to be forgotten, a sentence. command: that makes these runs.
    facts: method to further columns, title to text; the same titles for all.
    seconds: show what is measured by the clock, too; compare.csv and compare.json have it in any case.
    """
    folder = Path(folder)
    draw_across(runs, folder / "report.png", seconds)
    facts = facts or {}
    keys = [key for key, *_ in COLUMNS]
    titles = list(next(iter(facts.values()), {}))
    lines = [["method", "seed", *titles, "feature_extractor", *keys]]
    for name, several in runs.items():
        for run in several:
            found = figures(run)
            extractor = run.metrics.get("feature_extractor")
            known = [facts.get(name, {}).get(title) for title in titles]
            lines.append([name, run.metrics.get("seed"), *known, extractor, *(found[key] for key in keys)])

    write_csv(folder / "compare.csv", lines)
    compared = {
        "command": command,
        "asked": asked,
        "facts": facts,
        "methods": {
            name: [{**run.metrics, **figures(run), "evaluations": _drawn(run)} for run in several]
            for name, several in runs.items()
        },
    }
    write_json(folder / "compare.json", portable(compared))
    rows = _table(runs, facts, seconds)
    seeds = sorted({run.metrics.get("seed") for several in runs.values() for run in several})
    extractors = sorted({str(run.metrics.get("feature_extractor")) for several in runs.values() for run in several})
    shown = [(title, meaning) for _, title, _, meaning in COLUMNS if title in rows[0]]
    result = [
        Text(asked),
        Text(f"Mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}. Made by"),
        Code(command),
        figures_table(rows),
        Table(("column", "what it says"), shown, "ll"),
        Text(f"Features and judge: {', '.join(extractors)}."),
        Text(
            "UA alone can be had by drawing nothing: read it together with what is kept and with what is drawn in the "
            "forgotten one's place. A spread over few seeds is itself uncertain."
        ),
    ]
    curves = [
        Picture(
            "report.png",
            "Curves of what was measured, a colour a method",
            "Thin: the runs, each by itself. Thick: means over the runs, wherever all of a method were measured after "
            "as many images.",
        )
    ]
    sections = [Section("Result", result), Section("Curves", curves), *own_reports(folder, runs)]
    return write_document(folder, "Methods compared", sections)


def own_reports(folder: Path, runs: Mapping[str, Sequence[Run]]) -> list[Section]:
    """A section of links to the reports of runs below ``folder``; none where there are no such reports."""
    links = [
        Link(f"{name}, seed {run.metrics.get('seed')}", f"{run.folder.relative_to(folder).as_posix()}/report")
        for name, several in runs.items()
        for run in several
        if run.folder.is_relative_to(folder) and (run.folder / "report.md").is_file()
    ]
    return [Section("Runs", links)] if links else []
