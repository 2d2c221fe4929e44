"""What it takes to bring a forgotten class back: tables of the attacks, and curves of relearning."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import Figure, figure
from ..records import interpreting, read_object
from .blocks import Block, Picture, Section, Text, figures_table
from .curves import COLOURS, legend, new_figure, save_figure
from .relearning_cost import PICTURE, cost_blocks
from .render import write_document
from .tables import meanings_table
from .words import numbered

# Network and images to title, colour and line.
LINES = {
    ("run", "forgotten"): ("images of the forgotten class", COLOURS[1], "-"),
    ("run", "retained"): ("images of retained classes", COLOURS[0], "-"),
    ("scratch", "forgotten"): ("fresh weights, forgotten class", COLOURS[6], ":"),
    ("control", "forgotten"): ("never saw the class, forgotten class", COLOURS[2], "--"),
    ("relabel", "forgotten"): ("relabelled, forgotten class", COLOURS[3], "-."),
}
# Figures of the rows in robustness.json.
_ROWS = (
    Figure(
        "forget_frechet", "Fréchet distance, forgotten class", "Fréchet, forgotten", "", "{:.1f}", "higher",
        "Distance of the images drawn for the forgotten class from real images of it",
    ),
    Figure(
        "found_before", "Found at the start", "found at the start", "%", "{:.1f}", None,
        "Searches whose first image the judge assigns to the class",
    ),
    Figure(
        "found", "Found", "found", "%", "{:.1f}", "lower", "Searches whose last image the judge assigns to the class"
    ),
    Figure(
        "confirmed", "Confirmed", "confirmed", "%", "{:.1f}", "lower",
        "Such searches whose image is also nearest, by pixels, to a real image of the class",
    ),
    Figure(
        "probability_before", "Probability at the start", "probability at the start", "", "{:.3f}", None,
        "Mean probability of the class in the first images, by the judge",
    ),
    Figure(
        "probability", "Probability", "probability", "", "{:.3f}", "lower",
        "Mean probability of the class in the last images, by the judge",
    ),
    Figure(
        "distance", "Distance", "distance", "", "{:.2f}", None,
        "Of the class from the forgotten one, by the judge's features of real images",
    ),
    Figure("accuracy_before", "Accuracy before", "accuracy before", "%", "{:.1f}", None, "Of the pretrained network"),
    Figure(
        "accuracy", "Accuracy", "accuracy", "%", "{:.1f}", "higher", "Images of the class that the judge recognises"
    ),
    Figure(
        "called_forgotten_before", "Called forgotten before", "called forgotten before", "%", "{:.1f}", None,
        "Of the pretrained network",
    ),
    Figure(
        "called_forgotten", "Called forgotten", "called forgotten", "%", "{:.1f}", "lower",
        "Images of the class that the judge assigns to a forgotten class",
    ),
    Figure(
        "called_cover", "Called cover", "called cover", "%", "{:.1f}", None,
        "Images of the class that the judge assigns to the cover class",
    ),
    Figure(
        "still", "Still drawn", "still drawn", "%", "{:.1f}", "lower",
        "Images requested as a forgotten class that the judge assigns to one",
    ),
)  # fmt: skip
_FIGURES = {row.key: row for row in (figure("ua"), figure("retain_accuracy"), *_ROWS)}
# The figures in the table of each test.
COLUMNS = {
    "latent": ("found_before", "found", "confirmed", "probability_before", "probability"),
    "neighbours": (
        *("distance", "accuracy_before", "accuracy"),
        *("called_forgotten_before", "called_forgotten", "called_cover"),
    ),
    "guidance": ("still", "retain_accuracy"),
    "paths": ("still", "retain_accuracy"),
}


def attacks_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The attacks of rows, each with the sampler that it is measured by."""
    return list(dict.fromkeys((row["attack"], row["sampler"]) for row in rows))


def _title(attack: str, sampler: str) -> str:
    return f"{attack}, {sampler}"


def draw_relearning(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    panels: Sequence[str] = ("ua", "retain_accuracy", "forget_frechet"),
    lines: Mapping[tuple[str, str], tuple[str, Any, str]] = LINES,
) -> None:
    """Draws figures against steps of the attack, a row an attack: UA, retained accuracy and distance to the class, or
    other ``panels``; ``lines``: network and images to title, colour and line."""
    attacks = attacks_of(rows)
    figures = {key: _FIGURES[key] if key in _FIGURES else figure(key) for key in panels}
    canvas, axes = new_figure(len(attacks), len(panels))
    for row, (attack, sampler) in enumerate(attacks):
        for (network, data), (label, colour, style) in lines.items():
            points = [
                point
                for point in rows
                if (point["attack"], point["sampler"], point["network"], point["data"])
                == (attack, sampler, network, data)
            ]
            if not points:
                continue
            steps = [point["step"] for point in points]
            for place, key in enumerate(panels):
                values = [math.nan if point.get(key) is None else point[key] for point in points]
                axes[row][place].plot(steps, values, style, color=colour, marker="o", markersize=3, label=label)
        for place, key in enumerate(panels):
            panel = axes[row][place]
            panel.set_title(_title(attack, sampler), fontsize=10)
            if key == "forget_frechet":
                panel.set_yscale("log")
            elif figures[key].unit == "%":
                panel.set_ylim(-3, 103)
            panel.set_xlabel("Steps of inversion" if attack.startswith("inversion") else "Steps of fine-tuning")
            panel.set_ylabel(figures[key].axis)
            panel.grid(alpha=0.3)
    legend(canvas, axes.flat)
    save_figure(canvas, path)


def _relearning(result: Mapping[str, Any]) -> list[Block]:
    rows, recipe = result["relearn"], result["protocol"]["relearn"]
    steps = sorted({row["step"] for row in rows})
    cells = {(r["network"], r["data"], r["attack"], r["sampler"], r["step"]): r for r in rows}
    table = [["attack, sampled by", "fine-tuned on", *map(str, steps)]]
    for attack, sampler in attacks_of(rows):
        for (network, data), (label, *_) in LINES.items():
            at_steps = [cells.get((network, data, attack, sampler, step)) for step in steps]
            if at_steps[0] is not None:
                table.append([_title(attack, sampler), label, *map(_relearnt, at_steps)])
    for sampler, row in recipe["pretrained"].items():
        table.append([f"nothing, {sampler}", "the pretrained network", _relearnt(row), *[""] * (len(steps) - 1)])
    text = (
        f"Fine-tuned on {recipe['images']} real images of each forgotten class, or as many of retained classes, all of "
        f"them in every step, by Adam at {recipe['learning_rate']:g}. A column for each number of steps: UA in percent "
        "/ retained accuracy in percent / Fréchet distance of the images drawn for the forgotten class from real "
        "ones."
    )
    return [Text(text), figures_table(table), Picture(PICTURE, "UA and distances against steps of relearning")]


def _relearnt(row: Mapping[str, Any]) -> str:
    distance = _FIGURES["forget_frechet"].number(row["forget_frechet"])
    return f"{row['ua']:.0f} / {row['retain_accuracy']:.0f} / {distance}"


def _cells(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [_FIGURES[key].number(row.get(key)) for key in keys]


def _titles(keys: Sequence[str]) -> list[str]:
    return [_FIGURES[key].title for key in keys]


def _latents(result: Mapping[str, Any]) -> list[Block]:
    recipe, keys = result["protocol"]["latent"], COLUMNS["latent"]
    rows = [["network", "class searched for", "searches", *_titles(keys)]]
    rows += [[row["network"], row["group"], str(row["searches"]), *_cells(row, keys)] for row in result["latent"]]
    text = (
        f"{recipe['steps']} steps of Adam at {recipe['learning_rate']:g} on each latent. By pixels, the nearest image "
        f"of {recipe['nearest_image_accuracy']:.0f} % of the real images is of their class."
    )
    return [Text(text), figures_table(rows)]


def _neighbours(result: Mapping[str, Any]) -> list[Block]:
    keys, names = COLUMNS["neighbours"], result.get("class_names", ())
    rows = [["class", *_titles(keys)]]
    for row in result["neighbours"]:
        name = f"{numbered(row['class'], names)}{' (neighbour)' if row['neighbour'] else ''}"
        rows.append([name, *_cells(row, keys)])
    text = "Retained classes, those nearest to the forgotten one first. Before: the pretrained network, by DDIM."
    return [Text(text), figures_table(rows)]


def _guidance(result: Mapping[str, Any]) -> list[Block]:
    if not result["guidance"]:
        return [Text('The network has no label for "no condition", so it has no guidance.')]
    scales = ["no condition" if row["scale"] is None else f"{row['scale']:g}" for row in result["guidance"]]
    return [_still("scale", scales, result["guidance"])]


def _samplers(result: Mapping[str, Any]) -> list[Block]:
    text = "The same weights under samplers that they were not made for, without any training."
    return [Text(text), _still("sampler", [row["sampler"] for row in result["paths"]], result["paths"])]


def _still(title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Block:
    """The share of the forgotten class that is still drawn, by network and ``names``."""
    keys = COLUMNS["paths"]
    cells = [[row["network"], name, *_cells(row, keys)] for row, name in zip(rows, names, strict=True)]
    return figures_table([["network", title, *_titles(keys)], *cells])


PARTS = {
    "relearn": ("Relearning", _relearning),
    "latent": ("Latent search", _latents),
    "neighbours": ("Neighbouring classes", _neighbours),
    "guidance": ("Guidance", _guidance),
    "paths": ("Other samplers", _samplers),
}


def write_robustness_report(folder: Path) -> Path:
    """Writes the report of a run's robustness.json: robustness.md, robustness.html and, of relearning, robustness.png.

    Returns
    -------
    Path
        Of robustness.md.

    Raises
    ------
    ValueError
        If there is no robustness.json, or it is damaged.
    ImportError
        If matplotlib is missing.
    """
    folder = Path(folder)
    with interpreting(folder / "robustness.json"):
        return _write(folder, read_object(folder / "robustness.json"))


def _write(folder: Path, result: Mapping[str, Any]) -> Path:
    protocol = result["protocol"]
    names = result.get("class_names", ())
    classes = ", ".join(numbered(label, names) for label in result["forget_classes"])
    request = [
        Text(
            f"Method {result['method']}, forgotten class {classes}, sampled by {protocol['sampler']}, seed "
            f"{protocol['seed']}; judge {protocol['judge']['name']}; {result['seconds']:.0f} s."
        ),
        Text(
            "A class that these attacks do not bring back may yield to others. One network, one request, one seed, one "
            "judge."
        ),
    ]
    costs = cost_blocks(result)
    sections = [Section("What it costs to bring the class back", costs)] if costs else []
    sections.append(Section("Request", request))
    sections += [Section(title, blocks(result)) for name, (title, blocks) in PARTS.items() if name in result]
    keys = {key for name, columns in COLUMNS.items() if result.get(name) for key in columns}
    if keys:
        columns = [row for key, row in _FIGURES.items() if key in keys]
        sections.append(Section("Columns", [meanings_table(columns)]))
    if "relearn" in result:
        draw_relearning(result["relearn"], folder / PICTURE)
    return write_document(folder, "Does it stay forgotten?", sections, "robustness")
