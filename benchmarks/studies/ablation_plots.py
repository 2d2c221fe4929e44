"""Plots of a study: distances from the frontier, and curves by factor."""

import math
from collections.abc import Mapping
from pathlib import Path

from pecker_fast.figures import figure
from pecker_fast.report.curves import COLOURS, mean_curve, new_figure, save_figure

from .ablation import COST, FIGURES, TIME, Results

MARKERS = "osD^vP*Xp<>h"


def draw_frontier(several: Mapping[str, Results], path: Path) -> None:
    """Images to UA 98 against the retained Fréchet distance, means with 95 % intervals, a panel a pair of classes.

    A line joins the frontier's settings. If the UA of a seed never stayed at 98 %, the condition is drawn hollow, at a
    lower bound.
    """
    canvas, axes = new_figure(1, len(several))
    names = list(dict.fromkeys(name for of in several.values() for name in of.by_condition))
    others = [name for name in names if not any(name in of.frontier for of in several.values())]
    styles = {name: (COLOURS[1 + i % 6], MARKERS[i // 6 % len(MARKERS)]) for i, name in enumerate(others)}
    for panel, (title, of) in zip(axes[0], several.items(), strict=True):
        joined = {}
        for name in of.by_condition:
            if name == of.reference:
                continue
            x, y = of.mean(name, TIME), of.mean(name, COST)
            if x is None or y is None:
                continue
            colour, marker = styles.get(name, ("0.35", "o"))
            bars = {f"{axis}err": None if v.low is None else v.high - v.mean for axis, v in (("x", x), ("y", y))}
            fill = "none" if x.censored else colour
            label = None if name in of.frontier else name
            panel.errorbar(
                x.mean, y.mean, **bars, color=colour, marker=marker, mfc=fill, ms=6, lw=0, elinewidth=0.8, label=label
            )
            if name in of.frontier:
                joined[name] = x.mean, y.mean
                panel.annotate(name.split()[-1], (x.mean, y.mean), xytext=(4, 4), textcoords="offset points", size=7)
        if joined:
            line = [joined[name] for name in of.frontier if name in joined]
            panel.plot(*zip(*line, strict=True), color="0.35", lw=1, label="SFD, by coefficient")
        base = None if of.reference not in of.by_condition else of.mean(of.reference, COST)
        if base is not None:
            panel.axhline(base.mean, color="0.6", linestyle=":", label=of.reference)
        panel.set_title(title, size=10)
        panel.set_xlabel(FIGURES[TIME].axis)
        panel.set_ylabel(FIGURES[COST].axis)
        panel.grid(alpha=0.3)
    handles = {}
    for panel in axes[0]:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    if handles:
        columns = 3 * len(several)
        canvas.set_figheight(4.6 + 0.22 * (len(handles) // columns))
        canvas.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=7)
    save_figure(canvas, path)


def draw_curves(results: Results, path: Path) -> None:
    """UA and the retained Fréchet distance over the training, means over the seeds, a column for each factor."""
    factors: dict[str, list[str]] = {}
    for name, several in results.by_condition.items():
        if name not in (results.default, results.reference):
            factors.setdefault(next(iter(several.values())).factor, []).append(name)
    canvas, axes = new_figure(2, max(1, len(factors)))
    for column, (factor, names) in enumerate(factors.items()):
        shown = [name for name in (results.default, *names) if name in results.by_condition]
        for i, name in enumerate(shown):
            colour = "black" if name == results.default else COLOURS[i % 6]
            several = list(results.by_condition[name].values())
            for panel, key in ((axes[0][column], "ua"), (axes[1][column], COST)):
                curves = [{x: (x, y) for x, y in run.curves.get(key, [])} for run in several]
                mean = mean_curve(curves) or [(math.nan, math.nan)]
                marker = None if key == "ua" else "o"
                panel.plot(*zip(*mean, strict=True), color=colour, marker=marker, label=name)
        axes[0][column].set_title(factor, size=10)
        axes[0][column].legend(fontsize=7)
        for panel, key in ((axes[0][column], "ua"), (axes[1][column], COST)):
            panel.set_xlabel(figure("images").axis)
            panel.set_ylabel(FIGURES[key].axis)
            panel.grid(alpha=0.3)
    save_figure(canvas, path)
