"""Requests one after the other: a table and curves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..figures import derived, figure
from ..records import interpreting, read_object
from .blocks import Code, Picture, Section, Text, figures_table
from .curves import COLOURS, new_panels, save_figure
from .render import write_document
from .tables import meanings_table, text_table_of
from .words import cover_of, numbered

COLUMNS = (
    *("ua", "retain_accuracy", "worst_retained_accuracy", "frechet_distance", "frechet_over_real", "diversity"),
    *("images", "seconds"),
)


def _cells(sequence: Mapping[str, Any]) -> list[list[str]]:
    """A row for each request, the head first: UA of each class, then COLUMNS."""
    classes, names = sequence["forget_classes"], sequence.get("class_names", ())
    columns, ua = [figure(key) for key in COLUMNS], figure("ua")
    rows = [["request", *(f"UA of {numbered(c, names)} (%)" for c in classes), *(column.title for column in columns)]]
    for row in sequence["rows"]:
        measured = row["ua_by_class"]
        by_class = [ua.number(measured[str(c)]) if str(c) in measured else "" for c in classes]
        values = derived(row)
        rows.append([row["request"], *by_class, *(column.number(values.get(column.key)) for column in columns)])
    return rows


def draw_sequence(sequence: Mapping[str, Any], path: Path) -> None:
    """Draws the UA of each class, the retained accuracy and the Fréchet distance after each request.

    A dashed line is the result of forgetting all classes at once.
    """
    requests = [row for row in sequence["rows"] if row["request"] != "all at once"]
    once = next((row for row in sequence["rows"] if row["request"] == "all at once"), None)
    places = range(1, len(requests) + 1)
    curves = {}
    for key in ("retain_accuracy", "frechet_over_real"):
        points = [(p, derived(row).get(key)) for p, row in zip(places, requests, strict=True)]
        points = [point for point in points if point[1] is not None]
        if points:
            curves[key] = points
    canvas, (forgetting, *others) = new_panels(1 + len(curves))
    for colour, label in zip(COLOURS * 10, sequence["forget_classes"], strict=False):
        c, name = str(label), numbered(label, sequence.get("class_names", ()))
        points = [
            (p, row["ua_by_class"][c]) for p, row in zip(places, requests, strict=True) if c in row["ua_by_class"]
        ]
        forgetting.plot(*zip(*points, strict=True), color=colour, marker="o", label=f"class {name}")
    forgetting.set_ylabel(figure("ua").axis)
    forgetting.set_ylim(-3, 103)
    for panel, (key, points) in zip(others, curves.items(), strict=True):
        panel.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o", label="one after the other")
        if once is not None and derived(once).get(key) is not None:
            panel.axhline(derived(once)[key], color="0.4", linestyle="--", label="all at once")
        panel.set_ylabel(figure(key).axis)
        if figure(key).unit == "%":
            panel.set_ylim(-3, 103)
    for panel in (forgetting, *others):
        panel.legend(fontsize=8)
        panel.set_xticks(list(places), [row["request"] for row in requests])
        panel.grid(alpha=0.3)
    save_figure(canvas, path)


def write_sequence(folder: Path) -> tuple[Path, str]:
    """Writes the report of a sequence.json: sequence.md, sequence.html and sequence.png.

    Returns
    -------
    tuple of (Path, str)
        The path of sequence.md, and its table for a terminal.

    Raises
    ------
    ValueError
        If there is no sequence.json, or it is damaged.
    ImportError
        If matplotlib is missing.
    """
    folder = Path(folder)
    with interpreting(folder / "sequence.json"):
        return _write(folder, read_object(folder / "sequence.json"))


def _write(folder: Path, sequence: Mapping[str, Any]) -> tuple[Path, str]:
    draw_sequence(sequence, folder / "sequence.png")
    rows = _cells(sequence)
    cover = cover_of(sequence, sequence.get("class_names", ()))
    request = [
        Text(
            f"Method {sequence['method']}, preset {sequence['preset']}, seed {sequence['seed']}, with {cover} as cover."
        )
    ]
    if sequence["score"] is not None:
        start = "that of the previous request" if sequence["score"] == "previous" else "the pretrained network"
        request.append(
            Text(f"Every generator starts from that of the previous request, every score network from {start}.")
        )
    result = [
        figures_table(rows),
        Text(
            "UA of a class: images requested as this class that the judge assigns to none of the classes forgotten so "
            "far. Images and time are of each request alone; all at once has the budget of one request."
        ),
        meanings_table(map(figure, COLUMNS)),
        Picture("sequence.png", "UA, retained accuracy and Fréchet distance after each request"),
    ]
    sections = [
        Section("Requests", [*request, Text("Command:"), Code(sequence["command"])]),
        Section("Result", result),
    ]
    return write_document(folder, "Requests one after the other", sections, "sequence"), text_table_of(rows)
