"""Requests one after the other: a table and curves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .blocks import Code, Picture, Section, Text, figures_table
from .curves import COLOURS, new_figure, save_figure
from .render import write_document
from .tables import text_table_of

# Key, title and format.
COLUMNS = (
    ("ua", "UA %", "{:.1f}"),
    ("retain_accuracy", "retained %", "{:.1f}"),
    ("worst_retained_accuracy", "worst class %", "{:.1f}"),
    ("frechet_distance", "Fréchet", "{:.2f}"),
    ("frechet_over_real", "/ real", "{:.2f}"),
    ("diversity", "diversity", "{:.2f}"),
    ("images", "images", "{:.0f}"),
    ("seconds", "seconds", "{:.0f}"),
)


def _figures(row: Mapping[str, Any]) -> dict[str, float | None]:
    found = {key: row.get(key) for key, *_ in COLUMNS}
    if row.get("frechet_distance") is not None and row.get("frechet_real_split"):
        found["frechet_over_real"] = row["frechet_distance"] / row["frechet_real_split"]
    return found


def _cells(told: Mapping[str, Any]) -> list[list[str]]:
    classes = [str(c) for c in told["forget_classes"]]
    rows = [["request", *(f"UA of {c} %" for c in classes), *(title for _, title, _ in COLUMNS)]]
    for row in told["rows"]:
        by_class = [f"{row['ua_by_class'][c]:.1f}" if c in row["ua_by_class"] else "" for c in classes]
        found = _figures(row)
        rest = ["-" if found[key] is None else form.format(found[key]) for key, _, form in COLUMNS]
        rows.append([row["request"], *by_class, *rest])
    return rows


def draw_sequence(told: Mapping[str, Any], path: Path) -> None:
    """UA of each class, retained accuracy, and the Fréchet distance over that of real images, after each request; a
    line across for all at once."""
    figure, axes = new_figure(1, 3)
    forgetting, accuracy, distance = axes[0]
    requests = [row for row in told["rows"] if row["request"] != "all at once"]
    once = next((row for row in told["rows"] if row["request"] == "all at once"), None)
    places = range(1, len(requests) + 1)
    for colour, c in zip(COLOURS * 10, map(str, told["forget_classes"]), strict=False):
        points = [
            (p, row["ua_by_class"][c]) for p, row in zip(places, requests, strict=True) if c in row["ua_by_class"]
        ]
        forgetting.plot(*zip(*points, strict=True), color=colour, marker="o", label=f"class {c}")
    forgetting.set_ylabel("unlearning accuracy (%)")
    forgetting.legend(fontsize=8)
    for panel, key, label in (
        (accuracy, "retain_accuracy", "retained accuracy (%)"),
        (distance, "frechet_over_real", "Fréchet distance, retained,\nover that of real images"),
    ):
        points = [(p, _figures(row)[key]) for p, row in zip(places, requests, strict=True)]
        points = [point for point in points if point[1] is not None]
        if points:
            panel.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o", label="one after the other")
        if once is not None and _figures(once)[key] is not None:
            panel.axhline(_figures(once)[key], color="0.4", linestyle="--", label="all at once")
        panel.set_ylabel(label)
        panel.legend(fontsize=8)
    for panel in (forgetting, accuracy):
        panel.set_ylim(-3, 103)
    for panel in axes[0]:
        panel.set_xticks(list(places), [row["request"] for row in requests])
        panel.grid(alpha=0.3)
    save_figure(figure, path)


def write_sequence(folder: Path) -> tuple[Path, str]:
    """sequence.md, sequence.html and sequence.png from sequence.json; the first's path, and its table for a terminal.

    Raises OSError where there is none, ImportError where matplotlib is missing.
    """
    folder = Path(folder)
    told = json.loads((folder / "sequence.json").read_text())
    draw_sequence(told, folder / "sequence.png")
    rows = _cells(told)
    cover = "a retained class drawn at random" if told["cover_class"] is None else f"class {told['cover_class']}"
    asked = [Text(f"Method {told['method']}, preset {told['preset']}, seed {told['seed']}, with {cover} as cover.")]
    if told["score"] is not None:
        start = "the last request's" if told["score"] == "previous" else "the pretrained network"
        asked.append(Text(f"Generators go on from the last request's; score networks start from {start}."))
    result = [
        figures_table(rows),
        Text(
            "UA of a class: of the images asked for it, those that the judge calls none of the classes forgotten so "
            "far. Images and seconds are of each request alone: all at once has the budget of one request."
        ),
        Picture("sequence.png", "UA, retained accuracy and Fréchet distance after each request"),
    ]
    sections = [Section("Requests", [*asked, Text("Made by"), Code(told["command"])]), Section("Result", result)]
    return write_document(folder, "Requests one after the other", sections, "sequence"), text_table_of(rows)
