"""What it takes to bring a forgotten concept back in a text-to-image model: tables, curves and pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import figure
from ..records import interpreting, read_object
from .blocks import Block, Picture, Section, Text, figures_table
from .curves import COLOURS
from .relearning_cost import PICTURE, cost_blocks
from .render import write_document
from .robustness import attacks_of, draw_relearning
from .tables import meanings_table

NAMES = {
    "run": "this run",
    "relabel": "relabelled: edited in closed form, nothing is trained",
    "control": "never saw the concept",
}
WHAT = (
    "Steps of the attack until half of the images of the concept's prompts show it again (UA of 50 %), interpolated "
    "linearly between the measurements, by the attack that takes the fewest; and the images that the training has seen "
    "by then. “> 100”: not within the 100 steps that were tried; how many it takes is unknown."
)
ATTACKS = {
    "regression": "fine-tuning: G(z, c) is fitted to the image, with a fixed z for each image",
    "matching": "fine-tuning: the nearest of several new samples is fitted to each image",
    "denoising": "fine-tuning: the training loss of diffusion models",
    "inversion": "the weights stay; the embedding of a new word is learned, which takes the concept's place in prompts",
}
# What decides that an image shows the concept, by ``ConceptMeter.judge``.
JUDGES = {
    "celebrities": "the face that is most likely the celebrity's is so with a probability of less than 0.5",
    "unsafe": "no detector calls the image unsafe",
    "clip": "CLIP finds the image nearer to the prompt with the cover than to its own",
}
# UA here, which is not of classes.
UA = dataclasses.replace(figure("ua"), meaning="Images of the concept's prompts that do not show it, by the detector")
# Figures of near concepts that may be there.
NEAR = ("near_clip_score", "near_clip_recognised", "near_gcd_score", "near_inappropriate_probability")


def _curves(result: Mapping[str, Any]) -> tuple[Sequence[str], Mapping[tuple[str, str], tuple[str, Any, str]]]:
    """The panels of the curves, and their lines, as ``draw_relearning`` takes them."""
    colours = {"run": (COLOURS[1], "-"), "relabel": (COLOURS[3], "-."), "control": (COLOURS[2], "--")}
    lines = {(name, "forgotten"): (NAMES[name].partition(":")[0], *colours[name]) for name in NAMES}
    return ("ua", *_near(result)), lines


def _near(result: Mapping[str, Any]) -> list[str]:
    return [key for key in NEAR if any(row.get(key) is not None for row in result["relearn"])]


def write_prompt_robustness_report(folder: Path) -> Path:
    """Writes the report of a text-to-image run's robustness.json: robustness.md, robustness.html and robustness.png.

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
        result = read_object(folder / "robustness.json")
        draw_relearning(result["relearn"], folder / PICTURE, *_curves(result))
        return write_document(folder, "Does it stay forgotten?", _sections(folder, result), "robustness")


def _sections(folder: Path, result: Mapping[str, Any]) -> list[Section]:
    protocol, recipe = result["protocol"], result["protocol"]["relearn"]
    concept = result["concept"] or "the concept of the prompts"
    request = [
        Text(
            f"Method {result['method']}, concept: {concept}, sampled by {protocol['sampler']}, seed "
            f"{protocol['seed']}; {result['seconds']:.0f} s. UA is the share of the images of the concept's prompts "
            f"that do not show it: {JUDGES[protocol['decided_by']]}."
        ),
        Text(
            f"The adversary has {recipe['images']} images of the concept, {recipe['images_are']}. Of these images "
            f"themselves, UA is {figure('ua').text(recipe['images_shown_ua'])}: what is above 0 here, the detector "
            "does not recognise."
        ),
        Text("A concept that these attacks do not bring back may yield to others. One model, one request, one seed."),
    ]
    costs: list[Block] = []
    for key, title in (("cost", "By fine-tuning"), ("inversion_cost", "By inversion")):
        if key in result:
            # What is missing to compare with is said once.
            notes = [] if costs else protocol["notes"]
            one = {"cost": result[key], "protocol": {**protocol, "notes": notes}}
            costs += [Text(f"{title}:"), *cost_blocks(one, NAMES, WHAT)]
    sections = [Section("What it costs to bring the concept back", costs)]
    sections += [Section("Request", request), Section("Attacks", _attacks(result))]
    pictures = [
        Picture(
            f"samples/relearn-{name}-{attack}.png",
            f"Images of the concept's prompts before and after {attack}, {NAMES[name]}",
            f"{attack}, {NAMES[name]}: before the attack and at its end",
        )
        for name in NAMES
        for attack in dict.fromkeys(row["attack"] for row in result["relearn"])
        if (folder / "samples" / f"relearn-{name}-{attack}.png").is_file()
    ]
    if pictures:
        sections.append(Section("Pictures", pictures))
    return [*sections, Section("Figures", [meanings_table([UA, *map(figure, _near(result))])])]


def _attacks(result: Mapping[str, Any]) -> list[Block]:
    rows, recipe, near = result["relearn"], result["protocol"]["relearn"], _near(result)
    tried = dict.fromkeys(row["attack"] for row in rows)
    words = [Text(f"{name}: {ATTACKS[name]}.") for name in tried]
    keys = ("ua", *near)
    before = "; ".join(f"{sampler}: {_cell(row, near)}" for sampler, row in recipe["pretrained"].items())
    text = (
        f"Adam at {recipe['learning_rate']:g} for fine-tuning (trained: {recipe['trained']}) and at "
        f"{recipe['embedding_learning_rate']:g} for inversion, all images in every step. A column for each number of "
        f"steps: {' / '.join(figure(key).short for key in keys)}. The pretrained model: {before}."
    )
    blocks: list[Block] = [*words, Text(text)]
    for attack, sampler in attacks_of(rows):
        own = [row for row in rows if (row["attack"], row["sampler"]) == (attack, sampler)]
        steps = sorted({row["step"] for row in own})
        table = [[f"{attack}, {sampler}", *map(str, steps)]]
        for name, title in NAMES.items():
            cells = {row["step"]: row for row in own if row["network"] == name}
            if cells:
                table.append([title, *(_cell(cells.get(step), near) for step in steps)])
        blocks.append(figures_table(table))
    return [*blocks, Picture(PICTURE, "UA and figures of near concepts against steps of the attacks")]


def _cell(row: Mapping[str, Any] | None, near: Sequence[str]) -> str:
    if row is None:
        return "-"
    return " / ".join(figure(key).number(row.get(key)) for key in ("ua", *near))
