"""Curves of one run or of several, through matplotlib's objects: no global state is touched."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .files import Run
from .words import unmasked

# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = (
    ("ua", "unlearning accuracy (%)"),
    ("retain_accuracy", "retained accuracy (%)"),
    ("frechet_distance", "Fréchet distance, retained classes"),
    ("diversity", "diversity, retained (real = 1)"),
)


def new_figure(rows: int, columns: int):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the report's curves need matplotlib: pip install 'pecker-fast[demo]'") from error
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def points_of(records: Iterable[Mapping[str, Any]], x: str, y: str) -> dict[float, tuple[float, float]]:
    """Images seen to (x, y) of each evaluation that measured y and found a finite value."""
    return {
        record["images"]: (record[x], record[y])
        for record in records
        if record.get(y) is not None and math.isfinite(record[y])
    }


def mean_curve(curves: Sequence[Mapping[float, tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean point over the runs at each number of images that all of them were measured at, by images.

    ``curves``: of each run, images seen to (x, y).
    """
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [tuple(map(statistics.fmean, zip(*(curve[n] for curve in curves), strict=True))) for n in shared]


def _series(records: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    pairs = [(record[x], record[y]) for record in records if record.get(y) is not None and x in record]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _panel(axes, runs: Mapping[str, Run], key: str, label: str, x: str = "step") -> None:
    for colour, (name, run) in zip(_cycle(len(runs)), runs.items(), strict=True):
        axes.plot(*_series(run.evaluations, x, key), color=colour, marker="o", markersize=3, label=name)
    axes.set_xlabel("iteration" if x == "step" else "seconds of training")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    first = next(iter(runs.values())).metrics
    if key == "frechet_distance" and first.get("frechet_real_split") is not None:
        axes.set_yscale("log")
        axes.axhline(first["frechet_real_split"], color="0.4", linestyle="--", label="real against real")
    if key in ("ua", "retain_accuracy"):
        axes.set_ylim(-3, 103)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def save_figure(figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_run(run: Run, path: Path) -> None:
    """The curves of one run: forgetting, what is kept, losses, and where the mask lies."""
    figure, axes = new_figure(2, 3)
    name = str(run.config.get("method", run.metrics.get("method", "run")))
    for panel, (key, label) in zip(axes.flat, PANELS, strict=False):
        _panel(panel, {name: run}, key, label)
    axes[0][2].legend(fontsize=8)
    losses = sorted({key for line in run.log for key in line if key.startswith("loss_")})
    for colour, key in zip(_cycle(len(losses)), losses, strict=True):
        axes[1][1].plot(*_series(run.log, "step", key), color=colour, label=key.removeprefix("loss_"))
    axes[1][1].set_yscale("symlog")
    axes[1][1].set_xlabel("iteration")
    axes[1][1].set_ylabel("losses")
    axes[1][1].grid(alpha=0.3)
    if losses:
        axes[1][1].legend(fontsize=8)
    _mask_panel(axes[1][2], {name: run})
    save_figure(figure, path)


def _mask_panel(axes, runs: Mapping[str, Run]) -> None:
    masked = {name: run.mask for name, run in runs.items() if run.mask}
    if not masked:
        axes.set_axis_off()
        texts = dict.fromkeys(unmasked(run) for run in runs.values())
        axes.text(0.5, 0.5, "\n".join(texts).replace(": ", ":\n"), ha="center", va="center")
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
    axes.set_xlabel("salient entries (%), last mask")


def draw_comparison(runs: Mapping[str, Run], path: Path) -> None:
    """The curves of several runs: the same colour for a method throughout."""
    figure, axes = new_figure(2, 4)
    for panel, (key, label) in zip(axes.flat, PANELS, strict=False):
        _panel(panel, runs, key, label)
    _panel(axes[1][0], runs, "ua", PANELS[0][1], x="seconds")
    _panel(axes[1][1], runs, "frechet_distance", PANELS[2][1], x="seconds")
    _panel(
        axes[1][2],
        runs,
        "cover_frechet_distance",
        "Fréchet distance of the forgotten\nclass's images to the cover class",
    )
    _mask_panel(axes[1][3], runs)
    handles, labels = axes[0][2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    save_figure(figure, path)
