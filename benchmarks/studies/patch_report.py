"""The report of the study of patches: tables with 95 % intervals, paired differences, and the Pareto front."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pecker_fast.figures import Figure, figure
from pecker_fast.metrics.intervals import Interval, interval
from pecker_fast.report.blocks import Picture, Section, Text, figures_table
from pecker_fast.report.curves import COLOURS, new_figure, save_figure
from pecker_fast.report.render import write_document
from pecker_fast.report.tables import meanings_table

from .ablation import COST, TIME, AblationRun, Results, pooled
from .intervals import Frontier
from .patch_conditions import CONDITIONS, NOTHING_FORGOTTEN, PATCH, PLACES

FIGURES = {
    TIME: figure(TIME),
    COST: figure(COST),
    "retain_accuracy": figure("retain_accuracy"),
    "cover_frechet_distance": figure("cover_frechet_distance"),
    "cover_diversity": figure("cover_diversity"),
    "changed": Figure("changed", "Weights changed", "changed", "%", "{:.1f}", None, "Share of the generator's weights"),
    "patch_bytes": Figure(
        "patch_bytes",
        "Patch",
        "patch",
        "kB",
        "{:.0f}",
        "lower",
        "Size of the change as a file, or of the adapter",
        1e-3,
    ),
    "state_bytes": Figure(
        "state_bytes",
        "Optimizer state",
        "state",
        "kB",
        "{:.0f}",
        "lower",
        "Moments, average, masters and mask of the generator's optimizer",
        1e-3,
    ),
    "gradient_bytes": Figure(
        "gradient_bytes", "Gradients", "gradients", "kB", "{:.0f}", "lower", "Gradients of the generator", 1e-3
    ),
    "iteration_seconds": Figure(
        "iteration_seconds", "Iteration", "iteration", "s", "{:.3f}", "lower", "Processor time, median of the run"
    ),
}
COMPARED = (TIME, COST, "retain_accuracy", "cover_frechet_distance", "cover_diversity", "iteration_seconds")
BEST_DENSE = "best dense"
CLAIMS = (
    *((f"patch {density}", BEST_DENSE) for density in ("0.1", "0.05", "0.02")),
    *(
        (f"patch {density}", f"{score} {density}")
        for density in ("0.1", "0.05", "0.02")
        for score in ("random", "gradient", "magnitude")
    ),
    *((f"conditioning {density}", f"patch {density}") for density in ("0.05", "0.02")),
    ("conditioning 0.05", BEST_DENSE),
)
MARKERS = {"dense": "o", "patch": "D", "patch grid": "d", "score": "s", "place": "^", "psi": "P", "lora": "X"}


def _cell(value: Interval | None, key: str, signed: bool = False) -> str:
    if value is None:
        return "-"
    star = " *" if signed and value.side else ""
    return value.text(lambda x: FIGURES[key].number(x, signed=signed)) + star


def results_by_place(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Results]:
    """The runs of each preset and pair, in the order of the study's conditions and places.

    Raises
    ------
    ValueError
        If runs on a preset started from different generators.
    """
    generators: dict[str, str] = {}
    for record in records:
        sha256 = record["generator_sha256"]
        if generators.setdefault(record["preset"], sha256) != sha256:
            raise ValueError(
                f"runs on {record['preset']} started from two generators, {generators[record['preset']][:12]} and "
                f"{sha256[:12]}: expected one; move the records of the other away"
            )
    order = {condition.name: (i, condition.group) for i, condition in enumerate(CONDITIONS)}
    groups = [name for name, (_, group) in order.items() if group == "dense"]
    by_place: dict[tuple[str, str], list[AblationRun]] = {}
    for record in sorted(records, key=lambda x: (order.get(x["condition"], (len(order), ""))[0], x["seed"])):
        place = record["preset"], record["pair"]
        run = AblationRun(
            *place, record["condition"], record["group"], record["seed"], record["images"], record["figures"], {}
        )
        by_place.setdefault(place, []).append(run)
    places = [(preset, f"{a}-{b}") for preset, (a, b) in PLACES]
    ordered = sorted(by_place, key=lambda place: places.index(place) if place in places else len(places))
    return {place: Results(by_place[place], PATCH, groups, NOTHING_FORGOTTEN) for place in ordered}


def _means(of: Results) -> list[list[str]]:
    rows = [["condition", "seeds", *(FIGURES[key].title for key in FIGURES)]]
    for name, several in of.by_condition.items():
        cells = [_cell(of.mean(name, key), key) for key in FIGURES]
        rows.append([name, str(len(several)), *cells])
    return rows


def _differences(of: Results) -> list[list[str]]:
    """Paired differences from ``PATCH``; those of the time are of the seeds on which both get there."""
    rows = [["minus " + PATCH, "seeds", *(FIGURES[key].title for key in COMPARED), "Fréchet over the dense front"]]
    for name in of.by_condition:
        cells = ["-" if name == PATCH else _cell(of.against_default(name, key), key, signed=True) for key in COMPARED]
        excess = interval(list(of.excess_of_seeds(name).values()))
        rows.append([name, str(len(of.by_condition[name])), *cells, _cell(excess, COST, signed=True)])
    return rows


def best_dense(of: Results) -> str | None:
    """The dense setting that is best in time and cost together: the smallest sum of ranks among those that ran on every
    seed of the patch and always get there."""
    seeds = {*of.by_condition.get(PATCH, {})}
    times = {name: of.mean(name, TIME) for name in of.frontier}
    costs = {name: of.mean(name, COST) for name in of.frontier}
    names = [
        name
        for name in of.frontier
        if times[name] is not None and not times[name].censored and seeds <= {*of.by_condition[name]}
    ]
    ranks = {
        name: sum(sum(values[other].mean < values[name].mean for other in names) for values in (times, costs))
        for name in names
    }
    return min(ranks, key=ranks.get, default=None)


def _claims(by_place: Mapping[tuple[str, str], Results]) -> list[list[str]]:
    """The study's claims: paired differences at each place, and over all pairs of a preset together."""
    rows = [["place", "difference", "pairs of runs", "images to UA 98, %", FIGURES[TIME].title, FIGURES[COST].title]]
    places = [(f"{preset}, {pair}", [of]) for (preset, pair), of in by_place.items()]
    for preset in dict.fromkeys(preset for preset, _ in by_place):
        several = [of for (name, _), of in by_place.items() if name == preset]
        if len(several) > 1:
            places.append((f"{preset}, all pairs", several))
    for place, several in places:
        for name, other in CLAIMS:
            pairs = [pair for of in several for pair in _pairs(of, name, other)]
            if not pairs:
                continue
            best = best_dense(several[0]) if len(several) == 1 else "each pair's best dense setting"
            # A run that never gets there counts with its length: the difference is then a bound.
            times = [(_time(run), _time(rival)) for run, rival in pairs]
            relative = interval([100 * (a / b - 1) for a, b in times])
            absolute = interval([a - b for a, b in times])
            costs = interval([run.figures[COST] - rival.figures[COST] for run, rival in pairs])
            rows.append(
                [
                    place,
                    f"{name} minus {best if other == BEST_DENSE else other}",
                    str(len(pairs)),
                    relative.text(lambda x: f"{x:+.0f}") + (" *" if relative.side else ""),
                    _cell(absolute, TIME, signed=True),
                    _cell(costs, COST, signed=True),
                ]
            )
    return rows


def _pairs(of: Results, name: str, other: str) -> list[tuple[AblationRun, AblationRun]]:
    """The runs of two conditions on the same seed; ``other`` may be ``BEST_DENSE``."""
    rival = best_dense(of) if other == BEST_DENSE else other
    if rival is None:
        return []
    runs, rivals = (of.by_condition.get(key, {}) for key in (name, rival))
    return [(runs[seed], rivals[seed]) for seed in sorted({*runs} & {*rivals})]


def _time(run: AblationRun) -> float:
    return run.images if run.figures[TIME] is None else run.figures[TIME]


def _relearning(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The area under each curve of the UA against the attack's steps, in percent: higher resists longer."""
    by_place: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        by_place.setdefault((record["preset"], record["pair"], record["condition"]), {})[record["seed"]] = record["ua"]
    attacks = list(dict.fromkeys(attack for record in records for attack in record["ua"]))
    rows = [["place", "network", "seeds", *attacks]]
    for (preset, pair, name), several in by_place.items():
        cells = []
        for attack in attacks:
            curves = [_steps(ua[attack]) for ua in several.values()]
            means = [interval([curve[step] for curve in curves]) for step in curves[0]]
            cells.append(f"{' / '.join(f'{mean.mean:.0f}' for mean in means)}; mean {_area(curves)}")
        rows.append([f"{preset}, {pair}", name, str(len(several)), *cells])
    return rows


def _steps(curve: Mapping[Any, float]) -> dict[int, float]:
    return {int(step): ua for step, ua in curve.items() if int(step)}


def _area(curves: Iterable[Mapping[int, float]]) -> str:
    """Mean UA after the attack's numbers of steps, over seeds."""
    value = interval([sum(curve.values()) / len(curve) for curve in curves])
    return value.text(lambda x: f"{x:.0f}")


# Of the pictures: seeds of an interval that is drawn, and the largest distance.
FEWEST = 3
HIGHEST = 2.0


def draw_front(by_place: Mapping[tuple[str, str], Results], path: Path) -> None:
    """Images to UA 98 against the retained Fréchet distance, means with intervals, and the fronts of dense rules and of
    patches: the means that no other of their kind beats in both. Intervals of fewer than three seeds are left out, and
    points above ``HIGHEST`` are counted in words."""
    columns = min(len(by_place), 2)
    canvas, axes = new_figure(math.ceil(len(by_place) / columns), columns)
    for panel in axes.flat[len(by_place) :]:
        panel.set_visible(False)
    groups = {condition.name: condition.group for condition in CONDITIONS}
    for panel, ((preset, pair), of) in zip(axes.flat, by_place.items(), strict=False):
        points: dict[str, list[tuple[float, float]]] = {}
        above = 0
        for name in of.by_condition:
            x, y, group = of.mean(name, TIME), of.mean(name, COST), groups.get(name, "")
            if group not in MARKERS or x is None or y is None:
                continue
            if y.mean > HIGHEST:
                above += 1
                continue
            colour = COLOURS[list(MARKERS).index(group) % len(COLOURS)]
            drawn = len(of.by_condition[name]) >= FEWEST
            bars = {f"{axis}err": v.high - v.mean if drawn else None for axis, v in (("x", x), ("y", y))}
            label = group if group not in points else None
            fill = "none" if x.censored else colour
            style = {"marker": MARKERS[group], "mfc": fill, "ms": 5, "lw": 0, "elinewidth": 0.5}
            panel.errorbar(x.mean, y.mean, **bars, color=colour, label=label, **style)
            points.setdefault(group, []).append((x.mean, y.mean))
        heights = [y for several in points.values() for _, y in several]
        if heights:
            panel.set_ylim(0.8 * min(heights), 1.1 * max(heights))
        if above:
            panel.text(0.02, 0.97, f"{above} above", transform=panel.transAxes, va="top", size=8)
        for kinds, colour in ((("dense",), COLOURS[0]), (("patch", "patch grid"), COLOURS[1])):
            front = Frontier.of([point for kind in kinds for point in points.get(kind, [])])
            if front is not None:
                panel.plot(front.xs, front.ys, color=colour, lw=1)
        panel.set_title(f"{preset}, {pair}", size=10)
        panel.set_xlabel(FIGURES[TIME].axis)
        panel.set_ylabel(FIGURES[COST].axis)
        panel.grid(alpha=0.3)
        if points:
            panel.legend(fontsize=7)
    save_figure(canvas, path)


def _all_places(by_place: Mapping[tuple[str, str], Results]) -> list[list[str]]:
    several = list(by_place.values())
    common = [name for name in several[0].by_condition if all(name in of.by_condition for of in several)]
    rows = [["minus " + PATCH, "runs", *(FIGURES[key].title for key in COMPARED)]]
    for name in common:
        if name != PATCH:
            runs = sum(len(of.by_condition[name]) for of in several)
            cells = [_cell(pooled(several, name, PATCH, key), key, signed=True) for key in COMPARED]
            rows.append([name, str(runs), *cells])
    return rows


def write_summary(
    folder: Path, records: Sequence[Mapping[str, Any]], attacks: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write report.md, report.html and, if there are runs, front.png.

    Parameters
    ----------
    folder : Path
        Of the study's results.
    records, attacks : sequence of mapping
        Lines of the runs and of the attacks.

    Returns
    -------
    Path
        Of report.md.

    Raises
    ------
    ValueError
        If there is nothing to report.
    """
    if not records and not attacks:
        raise ValueError(f"results is {str(folder)!r}, which has no runs of this study")
    notes = (
        "Means over the seeds with 95 % t intervals. A star marks a difference whose interval leaves 0 out; one in "
        "twenty does so by chance.",
        "≥: the UA of some seeds never stayed at 98 %; the length of their run counts.",
        "The best dense setting of a place is the one with the least sum of its ranks in images to UA 98 and in the "
        "retained Fréchet distance, among those that ran on every seed of the patch and get there on all.",
        "Over the dense front: the Fréchet distance minus that of all dense settings of the same seed after the same "
        "number of images to UA 98.",
    )
    sections = [Section("How to read it", [*map(Text, notes), meanings_table(FIGURES.values())])]
    if records:
        by_place = results_by_place(records)
        sections.append(Section("Claims", [figures_table(_claims(by_place))]))
        for (preset, pair), of in by_place.items():
            tables = [figures_table(_means(of)), figures_table(_differences(of))]
            sections.append(Section(f"{preset}, {pair.replace('-', ' forgotten, with cover ')}", tables))
        if len(by_place) > 1:
            sections.append(Section("All places together", [figures_table(_all_places(by_place))]))
        draw_front(by_place, folder / "front.png")
        caption = "Images to UA 98 against the Fréchet distance of the retained classes; lines: fronts of their kind"
        sections.append(Section("Front", [Picture("front.png", caption)]))
    if attacks:
        meaning = "UA in percent after the attack's numbers of steps, and the mean over them: higher resists longer."
        sections.append(Section("Relearning", [Text(meaning), figures_table(_relearning(attacks))]))
    return write_document(folder, "Patches of a distilled generator", sections)
