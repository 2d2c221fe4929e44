"""What it takes to bring a forgotten class back: tables of the attacks, and curves of relearning."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .blocks import Block, Picture, Section, Text, figures_table
from .curves import COLOURS, new_figure, save_figure
from .render import write_document

PICTURE = "robustness.png"
# Network and images: title, colour, line.
LINES = {
    ("run", "forgotten"): ("images of the forgotten class", COLOURS[1], "-"),
    ("run", "retained"): ("images of retained classes", COLOURS[0], "-"),
    ("scratch", "forgotten"): ("fresh weights, forgotten class", COLOURS[6], ":"),
    ("control", "forgotten"): ("never saw the class, forgotten class", COLOURS[2], "--"),
}


def _attacks(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["attack"], row["sampler"]) for row in rows))


def _title(attack: str, sampler: str) -> str:
    return f"{attack}, {sampler}"


def draw_relearning(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """UA, the accuracy of retained classes, and how near the forgotten class's images come to real ones, against steps
    of fine-tuning: a column an attack."""
    attacks = _attacks(rows)
    panels = (
        ("ua", "unlearning accuracy (%)"),
        ("retain_accuracy", "retained accuracy (%)"),
        ("forget_frechet", "Fréchet distance of what is drawn\nfrom the real forgotten class"),
    )
    figure, axes = new_figure(len(panels), len(attacks))
    for column, (attack, sampler) in enumerate(attacks):
        for (network, data), (label, colour, style) in LINES.items():
            points = [
                row
                for row in rows
                if (row["attack"], row["sampler"], row["network"], row["data"]) == (attack, sampler, network, data)
            ]
            if not points:
                continue
            steps = [point["step"] for point in points]
            for place, (key, _) in enumerate(panels):
                values = [math.nan if point[key] is None else point[key] for point in points]
                axes[place][column].plot(steps, values, style, color=colour, marker="o", markersize=3, label=label)
        for place, (key, label) in enumerate(panels):
            panel = axes[place][column]
            if key == "forget_frechet":
                panel.set_yscale("log")
            else:
                panel.set_ylim(-3, 103)
            panel.set_xlabel("steps of fine-tuning")
            panel.set_ylabel(label)
            panel.grid(alpha=0.3)
        axes[0][column].set_title(_title(attack, sampler), fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    save_figure(figure, path)


def _number(value: float | None, form: str = "{:.1f}") -> str:
    return "-" if value is None else form.format(value)


def _relearning(found: Mapping[str, Any]) -> list[Block]:
    rows, recipe = found["relearn"], found["protocol"]["relearn"]
    steps = sorted({row["step"] for row in rows})
    cells = {(r["network"], r["data"], r["attack"], r["sampler"], r["step"]): r for r in rows}
    table = [["attack, sampled by", "fine-tuned on", *map(str, steps)]]
    for attack, sampler in _attacks(rows):
        for (network, data), (label, *_) in LINES.items():
            there = [cells.get((network, data, attack, sampler, step)) for step in steps]
            if there[0] is not None:
                table.append([_title(attack, sampler), label, *map(_relearnt, there)])
    for sampler, row in recipe["pretrained"].items():
        table.append([f"nothing, {sampler}", "the pretrained network", _relearnt(row), *[""] * (len(steps) - 1)])
    said = (
        f"Fine-tuned on {recipe['images']} real images of each forgotten class, or as many of retained ones, all of "
        f"them in every step, by Adam at {recipe['learning_rate']:g}. After so many steps: UA in percent / retained "
        "accuracy in percent / Fréchet distance of what is drawn for the forgotten class from real images of it."
    )
    return [Text(said), figures_table(table), Picture(PICTURE, "UA and distances against steps of relearning")]


def _relearnt(row: Mapping[str, Any]) -> str:
    return f"{row['ua']:.0f} / {row['retain_accuracy']:.0f} / {_number(row['forget_frechet'])}"


def _latents(found: Mapping[str, Any]) -> list[Block]:
    told = found["protocol"]["latent"]
    head = ["network", "class sought", "searches", "found at the start %", "found %", "confirmed %"]
    rows = [[*head, "probability at the start", "probability"]]
    for row in found["latent"]:
        shares = [_number(row[key]) for key in ("found_before", "found", "confirmed")]
        probabilities = [_number(row[key], "{:.3f}") for key in ("probability_before", "probability")]
        rows.append([row["network"], row["group"], str(row["searches"]), *shares, *probabilities])
    said = (
        f"{told['steps']} steps of Adam at {told['learning_rate']:g} on each latent. Confirmed: the nearest real "
        f"image, by pixels, is of the class too (of real images that holds for {told['nearest_image_accuracy']:.0f} %)."
    )
    return [Text(said), figures_table(rows)]


def _neighbours(found: Mapping[str, Any]) -> list[Block]:
    columns = {
        "accuracy_before": "accuracy before %",
        "accuracy": "after %",
        "called_forgotten_before": "called forgotten before %",
        "called_forgotten": "after %",
        "called_cover": "called cover %",
    }
    rows = [["class", "distance", *columns.values()]]
    for row in found["neighbours"]:
        name = f"{row['class']}{' (neighbour)' if row['neighbour'] else ''}"
        rows.append([name, _number(row["distance"], "{:.2f}"), *(_number(row.get(key)) for key in columns)])
    said = (
        "Retained classes, the nearest to the forgotten one first, by the judge's features of real images. Before: the "
        "pretrained network, by DDIM."
    )
    return [Text(said), figures_table(rows)]


def _guidance(found: Mapping[str, Any]) -> list[Block]:
    if not found["guidance"]:
        return [Text('The network has no label for "no condition": there is no guidance.')]
    scales = ["no condition" if row["scale"] is None else f"{row['scale']:g}" for row in found["guidance"]]
    return [_still("scale", scales, found["guidance"])]


def _samplers(found: Mapping[str, Any]) -> list[Block]:
    said = "The same weights, sampled otherwise than they were made for; nothing is trained."
    return [Text(said), _still("sampler", [row["sampler"] for row in found["paths"]], found["paths"])]


def _still(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Block:
    """What is still drawn of the forgotten class, by network and what ``names`` says."""
    head = ["network", title, "still called forgotten %", "retained accuracy %"]
    shown = zip(rows, names, strict=True)
    cells = [[row["network"], name, _number(row["still"]), _number(row["retain_accuracy"])] for row, name in shown]
    return figures_table([head, *cells])


PARTS = {
    "relearn": ("Relearning", _relearning),
    "latent": ("Latent search", _latents),
    "neighbours": ("Neighbouring classes", _neighbours),
    "guidance": ("Guidance", _guidance),
    "paths": ("Other samplers", _samplers),
}


def write_robustness_report(folder: Path) -> Path:
    """robustness.md, robustness.html and, where relearning was tested, robustness.png from a run's robustness.json;
    returns the first's path.

    Raises OSError where there is none, ImportError where matplotlib is missing.
    """
    folder = Path(folder)
    found = json.loads((folder / "robustness.json").read_text())
    protocol = found["protocol"]
    classes = ", ".join(map(str, found["forget_classes"]))
    request = [
        Text(
            f"Method {found['method']}, forgotten class {classes}, sampled by {protocol['sampler']}, seed "
            f"{protocol['seed']}; judge {protocol['judge']['name']}; {found['seconds']:.0f} s."
        ),
        Text(
            "A class that these attacks do not bring back may yield to others. One network, one request, one seed, one "
            "judge."
        ),
    ]
    sections = [Section("Request", request)]
    sections += [Section(title, blocks(found)) for name, (title, blocks) in PARTS.items() if name in found]
    if "relearn" in found:
        draw_relearning(found["relearn"], folder / PICTURE)
    return write_document(folder, "Does it stay forgotten?", sections, "robustness")
