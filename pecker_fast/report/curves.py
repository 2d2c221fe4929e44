"""Curves of one run or of several, drawn with matplotlib's objects, without its global state."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import figure
from ..files import replacing
from . import fonts
from .files import RunRecord
from .panels import KEY, LEGEND, Panel, described

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANELS = ("ua", "retain_accuracy", "frechet_distance", "diversity")
# Panels in a row of a picture, at most.
COLUMNS = 3
DPI = 110


def new_figure(rows: int, columns: int):
    """A figure of panels, and the panels as an array of rows. ImportError without matplotlib."""
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


def new_panels(count: int, columns: int = COLUMNS):
    """A figure of ``count`` panels, at most ``columns`` in a row, and the panels in their order."""
    columns = min(columns, count)
    canvas, axes = new_figure(-(-count // columns), columns)
    panels = list(axes.flat)
    for panel in panels[count:]:
        panel.remove()
    return canvas, panels[:count]


def _measured(runs: Mapping[str, RunRecord], key: str, x: str = "iterations") -> bool:
    """Whether a run has a point of the curve of a figure."""
    place = "step" if x == "iterations" else x
    return any(_series(run.evaluations, place, key)[0] for run in runs.values())


def _panel(axes, runs: Mapping[str, RunRecord], key: str, x: str = "iterations") -> None:
    curves = [_series(run.evaluations, "step" if x == "iterations" else x, key) for run in runs.values()]
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


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def save_figure(canvas, path: Path) -> None:
    """Save a figure as a PNG that records where its panels and its legend are (``panels.cut``).

    Every text gets fonts that have its characters.
    """
    from matplotlib.text import Text

    for text in canvas.findobj(Text):
        words = text.get_text()
        if not words.isascii():
            text.set_text(fonts.legible(words))
            text.set_fontfamily(fonts.families(words))
    renderer = canvas.canvas.get_renderer()
    canvas.draw_without_rendering()
    scale, width, height = DPI / canvas.dpi, *(round(side * DPI) for side in canvas.get_size_inches())
    panels = []
    for part in (*canvas.legends, *canvas.axes):
        name = LEGEND if part in canvas.legends else _name(part)
        box = part.get_tightbbox(renderer)
        if box is None:
            continue
        # The PNG's rows go down.
        left, top, right, bottom = box.x0 * scale, height - box.y1 * scale, box.x1 * scale, height - box.y0 * scale
        edges = max(0, int(left) - 4), max(0, int(top) - 4), min(width, int(right) + 5), min(height, int(bottom) + 5)
        panels.append(Panel(name, edges))
    with replacing(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=DPI, metadata={KEY: described(panels)})


def _name(axes) -> str:
    """What a panel shows, in words."""
    words = f"{axes.get_ylabel() or 'Bars'} against {axes.get_xlabel()}" if axes.get_xlabel() else axes.get_ylabel()
    return ": ".join(filter(None, (axes.get_title(), words)))


def draw_run(run: RunRecord, path: Path) -> list[str]:
    """Draw the curves of one run: forgetting, retained classes, losses, and the mask's density by part of the network.

    Returns
    -------
    list of str
        What was drawn, in words. Nothing is drawn for what was not measured; if that is everything, there is no file.
    """
    runs = {run.method: run}
    keys = [key for key in PANELS if _measured(runs, key)]
    losses = sorted({key for line in run.log for key in line if key.startswith("loss_")})
    shown = [figure(key).label for key in keys]
    shown += ["Losses"] if losses else []
    shown += ["Salient entries of the last mask by part of the network"] if run.mask else []
    if not shown:
        path.unlink(missing_ok=True)
        return []
    canvas, panels = new_panels(len(shown))
    for panel, key in zip(panels, keys, strict=False):
        _panel(panel, runs, key)
        if key == "frechet_distance":
            panel.legend(fontsize=8)
    if losses:
        _loss_panel(panels[len(keys)], run, losses)
    if run.mask:
        _mask_panel(panels[-1], runs)
    save_figure(canvas, path)
    return shown


def _loss_panel(axes, run: RunRecord, losses: Sequence[str]) -> None:
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


def draw_comparison(runs: Mapping[str, RunRecord], path: Path) -> bool:
    """Draw the curves of several runs, with the same colour for a method in all panels; of what was measured.

    Returns whether there was anything to draw; otherwise there is no file.
    """
    wanted = [*((key, "iterations") for key in PANELS), ("ua", "seconds"), ("frechet_distance", "seconds")]
    wanted.append(("cover_frechet_distance", "iterations"))
    curves = [(key, x) for key, x in wanted if _measured(runs, key, x)]
    masked = any(run.mask for run in runs.values())
    if not curves and not masked:
        path.unlink(missing_ok=True)
        return False
    canvas, panels = new_panels(len(curves) + masked, 4)
    for panel, (key, x) in zip(panels, curves, strict=False):
        _panel(panel, runs, key, x)
    if masked:
        _mask_panel(panels[-1], runs)
    legend(canvas, panels)
    save_figure(canvas, path)
    return True


def legend(canvas, panels: Iterable[Any]) -> None:
    """A legend above all panels of what they show."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        canvas.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(4, len(entries)))
