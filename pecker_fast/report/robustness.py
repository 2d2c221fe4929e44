"""robustness.md and robustness.png: what it takes to bring a forgotten class back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .curves import COLOURS, new_figure, save_figure
from .files import write_file
from .tables import markdown_table

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
    """UA, and below it the accuracy of retained classes, against steps of fine-tuning: a column an attack."""
    attacks = _attacks(rows)
    figure, axes = new_figure(2, len(attacks))
    for column, (attack, sampler) in enumerate(attacks):
        for (network, data), (label, colour, style) in LINES.items():
            points = [
                row
                for row in rows
                if (row["attack"], row["sampler"], row["network"], row["data"]) == (attack, sampler, network, data)
            ]
            if not points:
                continue
            for panel, key in ((axes[0][column], "ua"), (axes[1][column], "retain_accuracy")):
                values = [point[key] for point in points]
                steps = [point["step"] for point in points]
                panel.plot(steps, values, style, color=colour, marker="o", markersize=3, label=label)
        for panel, label in ((axes[0][column], "unlearning accuracy (%)"), (axes[1][column], "retained accuracy (%)")):
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


def _relearn_text(found: Mapping[str, Any]) -> list[str]:
    rows, recipe = found["relearn"], found["protocol"]["relearn"]
    steps = sorted({row["step"] for row in rows})
    cells = {(r["network"], r["data"], r["attack"], r["sampler"], r["step"]): r for r in rows}
    lines = []
    for attack, sampler in _attacks(rows):
        for (network, data), (label, *_) in LINES.items():
            there = [cells.get((network, data, attack, sampler, step)) for step in steps]
            if there[0] is None:
                continue
            lines.append(
                [_title(attack, sampler), label, *(f"{r['ua']:.0f} / {r['retain_accuracy']:.0f}" for r in there)]
            )
    return [
        "## Relearning",
        "",
        f"Fine-tuned on {recipe['images']} real images of each forgotten class, or as many of retained ones, all of "
        f"them in every step, by Adam at {recipe['learning_rate']:g}. UA / retained accuracy in percent after so many "
        "steps.",
        "",
        *markdown_table([["attack, sampled by", "fine-tuned on", *map(str, steps)], *lines]),
        "![UA against steps of relearning](robustness.png)",
        "",
    ]


def _latent_text(found: Mapping[str, Any]) -> list[str]:
    told = found["protocol"]["latent"]
    rows = [
        [
            row["network"],
            row["group"],
            str(row["searches"]),
            *(_number(row[key]) for key in ("found_before", "found", "confirmed")),
            *(_number(row[key], "{:.3f}") for key in ("probability_before", "probability")),
        ]
        for row in found["latent"]
    ]
    head = ["network", "class sought", "searches", "found at the start %", "found %", "confirmed %"]
    return [
        "## Latent search",
        "",
        f"{told['steps']} steps of Adam at {told['learning_rate']:g} on each latent. Confirmed: the nearest real "
        "image, by pixels, is of the class too (of real images that holds for "
        f"{told['nearest_image_accuracy']:.0f} %).",
        "",
        *markdown_table([[*head, "probability at the start", "probability"], *rows]),
    ]


def _neighbours_text(found: Mapping[str, Any]) -> list[str]:
    keys = ("accuracy_before", "accuracy", "called_forgotten_before", "called_forgotten", "called_cover")
    rows = [
        [f"{r['class']}{' (neighbour)' if r['neighbour'] else ''}", _number(r["distance"], "{:.2f}")]
        + [_number(r.get(key)) for key in keys]
        for r in found["neighbours"]
    ]
    head = [
        "class",
        "distance",
        "accuracy before %",
        "after %",
        "called forgotten before %",
        "after %",
        "called cover %",
    ]
    return [
        "## Neighbouring classes",
        "",
        "Retained classes, the nearest to the forgotten one first, by the judge's features of real images. Before: the "
        "pretrained network, by DDIM.",
        "",
        *markdown_table([head, *rows]),
    ]


def _guidance_text(found: Mapping[str, Any]) -> list[str]:
    if not found["guidance"]:
        return ["## Guidance", "", 'The network has no label for "no condition": there is no guidance.', ""]
    rows = [
        [
            row["network"],
            "no condition" if row["scale"] is None else f"{row['scale']:g}",
            _number(row["still"]),
            _number(row["retain_accuracy"]),
        ]
        for row in found["guidance"]
    ]
    return [
        "## Guidance",
        "",
        *markdown_table([["network", "scale", "still called forgotten %", "retained accuracy %"], *rows]),
    ]


def _paths_text(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [row["network"], row["sampler"], _number(row["still"]), _number(row["retain_accuracy"])]
        for row in found["paths"]
    ]
    return [
        "## Other samplers",
        "",
        "The same weights, sampled otherwise than they were made for; nothing is trained.",
        "",
        *markdown_table([["network", "sampler", "still called forgotten %", "retained accuracy %"], *rows]),
    ]


PARTS = {
    "relearn": _relearn_text,
    "latent": _latent_text,
    "neighbours": _neighbours_text,
    "guidance": _guidance_text,
    "paths": _paths_text,
}


def write_robustness_report(folder: Path) -> Path:
    """robustness.md, and robustness.png where relearning was tested, from a run's robustness.json; the former's path.

    Raises OSError where there is none, ImportError where matplotlib is missing.
    """
    folder = Path(folder)
    found = json.loads((folder / "robustness.json").read_text())
    protocol = found["protocol"]
    classes = ", ".join(map(str, found["forget_classes"]))
    lines = ["# Does it stay forgotten?", ""]
    lines += [
        f"Method `{found['method']}`, forgotten class {classes}, sampled by {protocol['sampler']}, seed "
        f"{protocol['seed']}; judge {protocol['judge']['name']}; {found['seconds']:.0f} s.",
        "",
    ]
    for name, text in PARTS.items():
        if name in found:
            lines += text(found)
    lines += [
        "A class that these attacks do not bring back may yield to others. One network, one request, one seed, one "
        "judge.",
        "",
    ]
    if "relearn" in found:
        draw_relearning(found["relearn"], folder / "robustness.png")
    write_file(folder / "robustness.md", lambda path: path.write_text("\n".join(lines)))
    return folder / "robustness.md"
