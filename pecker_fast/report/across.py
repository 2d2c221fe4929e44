"""Several methods over several seeds: a table with means and spreads, curves, and the figures of each run."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..figures import Figure, figure
from ..files import write_json
from ..records import read_object
from .blocks import Block, Caution, Code, Link, Picture, Section, Text, figures_table
from .cautions import cautions_of
from .curves import COLOURS, legend, mean_curve, new_panels, points_of, save_figure
from .files import RunRecord, write_csv
from .places import portable
from .render import write_document
from .tables import meanings_table, text_table_of

# Figures that depend on the machine's speed.
TIMED = ("seconds", "seconds_per_image")


@dataclass(frozen=True)
class Layout:
    """What a comparison of methods shows.

    Parameters
    ----------
    title : str
        Of the report.
    columns : tuple of str
        Keys of the figures in the report's table and in compare.csv, in order.
    main : tuple of str
        Those in the terminal's table.
    curves : tuple of str
        Figures that are drawn over the training, from evaluation.jsonl.
    notes : tuple of str
        Paragraphs below the table.
    facts_in_csv : bool
        Whether compare.csv has the methods' facts and the name of the features too.
    """

    title: str
    columns: tuple[str, ...]
    main: tuple[str, ...]
    curves: tuple[str, ...]
    notes: tuple[str, ...]
    facts_in_csv: bool


CLASSES = Layout(
    title="Methods compared",
    columns=(
        *("ua", "pul", "ua_last_half_min", "retain_accuracy", "frechet_distance", "frechet_over_real"),
        *(
            "u_frechet_distance",
            "fid",
            "u_fid",
            "sfid",
            "is",
            "kid",
            "precision",
            "recall",
            "extractor_precision",
            "extractor_recall",
        ),
        *("diversity", "cover_frechet_distance", "cover_diversity", "images_to_forget", "images", "seconds"),
        *("sampling_steps", "seconds_per_image", "peak_memory_gib"),
        *("relearn_steps_to_half", "cost_over_relabel", "cost_over_control"),
        *("relearn_forget_ua_50", "latent_own_confirmed", "paths_still_most"),
        *("reached", "parameters_changed", "drift_norm"),
    ),
    main=(
        *("ua", "retain_accuracy", "frechet_distance", "frechet_over_real", "diversity"),
        *("images_to_forget", "seconds", "seconds_per_image"),
    ),
    curves=("ua", "retain_accuracy", "frechet_distance", "cover_frechet_distance"),
    notes=(
        "A model that outputs noise also scores 100 % UA. Read it together with the figures of the retained classes "
        "and of what is drawn for the forgotten one. The spread over a few seeds is itself uncertain.",
    ),
    facts_in_csv=True,
)
_CONCEPT_COLUMNS = (
    *("no_face_share", "gcd_score", "near_no_face_share", "near_gcd_score"),
    *("inappropriate_probability", "max_expected_inappropriateness", "near_inappropriate_probability"),
    *("clip_score", "near_clip_score", "coco_clip_score", "fid", "sampling_steps", "images", "seconds"),
)
PROMPTS = Layout(
    title="Concept forgotten",
    columns=_CONCEPT_COLUMNS,
    main=_CONCEPT_COLUMNS,
    curves=(),
    notes=(
        "Prompts, detectors, thresholds and versions are in evaluation.json in the folder of each run. A concept that "
        "is forgotten on these prompts may come back on others.",
    ),
    facts_in_csv=False,
)


def figures(run: RunRecord, columns: Sequence[str] = CLASSES.columns) -> dict[str, Any]:
    """The columns of one run; None for figures that it lacks."""
    measured = run.figures
    return {key: measured.get(key) for key in columns}


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float | None, int] | None:
    """Mean, sample standard deviation (None of fewer than two) and count of the values that are not None.

    None if there are no such values.
    """
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    return statistics.fmean(measured), statistics.stdev(measured) if len(measured) > 1 else None, len(measured)


def _cell(values: Sequence[float | None], column: Figure) -> str:
    """Mean and spread, "-" if nothing was measured."""
    result = mean_and_spread(values)
    if result is None:
        return "-"
    mean, spread, count = result
    text = column.number(mean) + ("" if spread is None else f" ± {column.number(spread)}")
    # A mean over some of the seeds only is not the method's mean.
    return text if count == len(values) else f"{text} ({count} of {len(values)})"


def _table(
    runs: Mapping[str, Sequence[RunRecord]],
    facts: Mapping[str, Mapping[str, str]],
    columns: Sequence[str],
    seconds: bool,
) -> tuple[list[list[str]], list[str]]:
    """Rows of cells, the head first, and the keys of their figures.

    Columns that no run has are left out, and without ``seconds`` those that depend on the machine's speed.
    """
    measured = {name: [figures(run, columns) for run in of] for name, of in runs.items()}
    keys = [
        key
        for key in columns
        if (seconds or key not in TIMED) and any(row[key] is not None for rows in measured.values() for row in rows)
    ]
    titles = list(next(iter(facts.values()), {}))
    table = [["method", *titles, *(figure(key).title for key in keys)]]
    for name, rows in measured.items():
        cells = [_cell([row[key] for row in rows], figure(key)) for key in keys]
        table.append([name, *facts.get(name, {}).values(), *cells])
    return table, keys


def text_table(runs: Mapping[str, Sequence[RunRecord]], seconds: bool = True, shown: Layout = CLASSES) -> str:
    """The main columns for a terminal. Arguments as for ``write_across``."""
    return text_table_of(_table(runs, {}, shown.main, seconds)[0])


def _curves(panel, name: str, runs: Sequence[RunRecord], colour: str, key: str, x: str) -> None:
    """Each run as a thin line, and the mean over the runs at every number of images at which all were measured."""
    curves = [points_of(run.evaluations, x, key) for run in runs]
    for curve in filter(None, curves):
        panel.plot(*zip(*curve.values(), strict=True), color=colour, lw=0.7, marker=".", ms=3, alpha=0.5)
    # An empty line keeps the method's entry in the legend.
    mean = mean_curve(curves) or [(math.nan, math.nan)]
    panel.plot(*zip(*mean, strict=True), color=colour, marker="o", markersize=4, label=name)


def draw_across(
    runs: Mapping[str, Sequence[RunRecord]], path: Path, seconds: bool = True, keys: Sequence[str] = CLASSES.curves
) -> bool:
    """Draws figures of the evaluations against images seen and, with ``seconds``, against the training time.

    Figures that no run has are left out. Returns whether there was anything to draw; otherwise there is no file.
    """
    places = ("images", "seconds") if seconds else ("images",)
    every = [run for several in runs.values() for run in several]
    curves = [(x, key) for x in places for key in keys if any(points_of(run.evaluations, x, key) for run in every)]
    if not curves:
        path.unlink(missing_ok=True)
        return False
    canvas, panels = new_panels(len(curves), max(2, -(-len(curves) // 2)))
    for panel, (x, key) in zip(panels, curves, strict=True):
        for i, (name, several) in enumerate(runs.items()):
            _curves(panel, name, several, COLOURS[i % len(COLOURS)], key, x)
        panel.set_xlabel(figure(x).axis)
        panel.set_ylabel(figure(key).axis)
        panel.grid(alpha=0.3)
        ends = [run.evaluations[-1][x] for run in every if run.evaluations]
        # A much slower method would squeeze the others into a corner.
        if ends and max(ends) > 10 * min(ends) > 0:
            panel.set_xscale("log")
        if "frechet" in key:
            panel.set_yscale("log")
        if figure(key).unit == "%":
            panel.set_ylim(-3, 103)
    legend(canvas, panels)
    save_figure(canvas, path)
    return True


def _brief(run: RunRecord) -> dict[str, Any]:
    """metrics.json of a run without what each prompt scored, which may be thousands."""
    return {key: value for key, value in run.metrics.items() if key != "by_prompt"}


def _evaluations(run: RunRecord, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The part of a run's evaluations that the curves and the figures need."""
    return [{key: line[key] for key in ("images", "seconds", *keys) if key in line} for line in run.evaluations]


def read_across(path: Path) -> tuple[dict[str, list[RunRecord]], dict[str, Any]]:
    """The runs of a compare.json, and the arguments "asked", "command" and "facts" of ``write_across``.

    Raises
    ------
    ValueError
        If there is no such file, or it is no comparison.
    """
    path = Path(path)
    try:
        compared = read_object(path)
        arguments = {key: compared[key] for key in ("asked", "command", "facts")}
        runs = {
            name: [
                RunRecord(path.parent / f"{name}-seed{metrics['seed']}", {}, metrics, [], metrics.pop("evaluations"))
                for metrics in several
            ]
            for name, several in compared["methods"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"runs is {str(path)!r}, expected compare.json of a comparison: {_words(error)}") from error
    return runs, arguments


def _words(error: Exception) -> str:
    """What is wrong with a file, in words: a KeyError has only the key."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def write_across(
    folder: Path,
    runs: Mapping[str, Sequence[RunRecord]],
    *,
    asked: str,
    command: str,
    facts: Mapping[str, Mapping[str, str]] | None = None,
    seconds: bool = True,
    pictures: Sequence[tuple[str, str]] = (),
    shown: Layout = CLASSES,
) -> Path:
    """Writes the report of a comparison, and its figures as data.

    These are report.md, report.html, report.png (if curves are shown), compare.csv (a line a run) and compare.json,
    which ``read_across`` reads.

    Parameters
    ----------
    folder : Path
    runs : mapping of str to sequence of RunRecord
        The runs of each method, one a seed.
    asked : str
        The request, as a sentence.
    command : str
        The command that makes these runs.
    facts : mapping, optional
        Further columns in words: method to title to text, with the same titles for all methods.
    seconds : bool
        Whether to show figures that depend on the machine's speed; compare.csv and compare.json always hold them.
    pictures : sequence of (str, str)
        Files in the folder, and what they show.
    shown : Layout
        ``CLASSES`` or ``PROMPTS``.

    Returns
    -------
    Path
        Of report.md.
    """
    folder, facts = Path(folder), facts or {}
    _write_csv(folder / "compare.csv", runs, facts, shown)
    compared = {
        "command": command,
        "asked": asked,
        "facts": facts,
        "methods": {
            name: [
                {**_brief(run), **figures(run, shown.columns), "evaluations": _evaluations(run, shown.curves)}
                for run in several
            ]
            for name, several in runs.items()
        },
    }
    write_json(folder / "compare.json", portable(compared))
    table, keys = _table(runs, facts, shown.columns, seconds)
    every = [run.metrics for several in runs.values() for run in several]
    # Methods that train nothing have no seed.
    seeds = sorted({metrics["seed"] for metrics in every if metrics.get("seed") is not None})
    warned = [Caution(text) for text in cautions_of(runs)]
    result: list[Block] = [
        Text(asked),
        *warned,
        Text(f"Mean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}. Command:"),
        Code(command),
        figures_table(table),
        meanings_table(map(figure, keys)),
    ]
    extractors = sorted({str(metrics["feature_extractor"]) for metrics in every if metrics.get("feature_extractor")})
    if extractors:
        result.append(Text(f"Features and judge: {', '.join(extractors)}."))
    result += map(Text, shown.notes)
    sections = [Section("Result", result)]
    if shown.curves and draw_across(runs, folder / "report.png", seconds, shown.curves):
        curves = Picture(
            "report.png",
            "Curves of the figures over the training, one colour for each method",
            "Thin lines are single runs. Thick lines are means over the runs of a method, at every number of images at "
            "which all of them were measured.",
        )
        sections.append(Section("Curves", [curves]))
    if pictures:
        sections.append(Section("Images", [Picture(file, text, text) for file, text in pictures]))
    return write_document(folder, shown.title, [*sections, *_own_reports(folder, runs)])


def _write_csv(
    path: Path, runs: Mapping[str, Sequence[RunRecord]], facts: Mapping[str, Mapping[str, str]], shown: Layout
) -> None:
    titles = list(next(iter(facts.values()), {})) if shown.facts_in_csv else []
    extractor = ["feature_extractor"] if shown.facts_in_csv else []
    lines = [["method", "seed", *titles, *extractor, *shown.columns]]
    for name, several in runs.items():
        words = [facts.get(name, {}).get(title) for title in titles]
        for run in several:
            measured = figures(run, shown.columns)
            extracted = [run.metrics.get(key) for key in extractor]
            lines.append([name, run.metrics.get("seed"), *words, *extracted, *measured.values()])
    write_csv(path, lines)


def _own_reports(folder: Path, runs: Mapping[str, Sequence[RunRecord]]) -> list[Section]:
    """A section with links to the runs' reports below ``folder``; none if there are no such reports."""
    links = [
        Link(f"{name}, seed {run.metrics.get('seed')}", f"{run.folder.relative_to(folder).as_posix()}/report")
        for name, several in runs.items()
        for run in several
        if run.folder.is_relative_to(folder) and (run.folder / "report.md").is_file()
    ]
    return [Section("Runs", links)] if links else []
