"""Curves of one run or of several, drawn with matplotlib's objects, without its global state."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import figure
from ..files import replacing
from .files import RunRecord
from .words import unmasked

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = ("ua", "retain_accuracy", "frechet_distance", "diversity")


def new_figure(rows: int, columns: int):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's curves need matplotlib: pip install 'pecker-fast[train]'") from error
    canvas = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas, canvas.subplots(rows, columns, squeeze=False)


def points_of(records: Iterable[Mapping[str, Any]], x: str, y: str) -> dict[float, tuple[float, float]]:
    """Images seen to (x, y), of each evaluation with a finite y."""
    return {
        record["images"]: (record[x], record[y])
        for record in records
        if record.get(y) is not None and math.isfinite(record[y])
    }


def mean_curve(curves: Sequence[Mapping[float, tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean point over the runs, at each number of images at which all of them were measured.

    ``curves``: for each run, images seen to (x, y).
    """
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [tuple(map(statistics.fmean, zip(*(curve[n] for curve in curves), strict=True))) for n in shared]


def _series(records: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    pairs = [(record[x], record[y]) for record in records if record.get(y) is not None and x in record]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _panel(axes, runs: Mapping[str, RunRecord], key: str, x: str = "iterations") -> None:
    curves = [_series(run.evaluations, "step" if x == "iterations" else x, key) for run in runs.values()]
    if not any(points for points, _ in curves):
        _say(axes, f"{figure(key).label}: not measured")
        return
    for colour, name, points in zip(_cycle(len(runs)), runs, curves, strict=True):
        axes.plot(*points, color=colour, marker="o", markersize=3, label=name)
    axes.set_xlabel(figure(x).axis)
    axes.set_ylabel(figure(key).axis)
    axes.grid(alpha=0.3)
    first = next(iter(runs.values())).metrics
    if key == "frechet_distance" and first.get("frechet_real_split") is not None:
        axes.set_yscale("log")
        axes.axhline(first["frechet_real_split"], color="0.4", linestyle="--", label="real images")
    if figure(key).unit == "%":
        axes.set_ylim(-3, 103)


def _say(axes, text: str) -> None:
    """Words in the place of a panel."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text.replace(": ", ":\n"), ha="center", va="center")


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def save_figure(canvas, path: Path) -> None:
    with replacing(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=110)


def draw_run(run: RunRecord, path: Path) -> None:
    """The curves of one run: forgetting, retained classes, losses, and the mask's density by part of the network."""
    canvas, axes = new_figure(2, 3)
    for panel, key in zip(axes.flat, PANELS, strict=False):
        _panel(panel, {run.method: run}, key)
    if axes[0][2].get_legend_handles_labels()[0]:
        axes[0][2].legend(fontsize=8)
    _loss_panel(axes[1][1], run)
    _mask_panel(axes[1][2], {run.method: run})
    save_figure(canvas, path)


def _loss_panel(axes, run: RunRecord) -> None:
    losses = sorted({key for line in run.log for key in line if key.startswith("loss_")})
    if not losses:
        _say(axes, "Losses: none was logged")
        return
    for colour, key in zip(_cycle(len(losses)), losses, strict=True):
        points = _series(run.log, "step", key)
        # A line of one point cannot be seen.
        marker = "o" if len(points[0]) == 1 else None
        name = key.removeprefix("loss_").replace("_", " ")
        axes.plot(*points, color=colour, marker=marker, markersize=3, label=name)
    axes.set_yscale("symlog")
    axes.set_xlabel(figure("iterations").axis)
    axes.set_ylabel("Losses")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _mask_panel(axes, runs: Mapping[str, RunRecord]) -> None:
    masked = {name: run.mask for name, run in runs.items() if run.mask}
    if not masked:
        _say(axes, "\n".join(dict.fromkeys(unmasked(run) for run in runs.values())))
        return
    modules = list(dict.fromkeys(m for mask in masked.values() for m in mask["mask_density_by_module"]))
    height = 0.8 / len(masked)
    colours = dict(zip(runs, _cycle(len(runs)), strict=True))
    for i, (name, mask) in enumerate(masked.items()):
        shares = [100 * mask["mask_density_by_module"].get(module, 0.0) for module in modules]
        places = [row + i * height for row in range(len(modules))]
        axes.barh(places, shares, height=height, color=colours[name], label=name)
        axes.axvline(100 * mask["mask_density"], color=colours[name], linestyle="--", linewidth=1)
    axes.set_yticks(
        [row + 0.4 - height / 2 for row in range(len(modules))], modules, fontsize=8 if len(modules) < 15 else 6
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("Salient entries of the last mask (%)")


def draw_comparison(runs: Mapping[str, RunRecord], path: Path) -> None:
    """The curves of several runs, with the same colour for a method in all panels."""
    canvas, axes = new_figure(2, 4)
    for panel, key in zip(axes.flat, PANELS, strict=False):
        _panel(panel, runs, key)
    _panel(axes[1][0], runs, "ua", x="seconds")
    _panel(axes[1][1], runs, "frechet_distance", x="seconds")
    _panel(axes[1][2], runs, "cover_frechet_distance")
    _mask_panel(axes[1][3], runs)
    legends = [panel.get_legend_handles_labels() for panel in (axes[0][2], *axes.flat)]
    handles, labels = next((legend for legend in legends if legend[0]), ([], []))
    if handles:
        canvas.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    save_figure(canvas, path)
