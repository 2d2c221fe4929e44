"""What it costs to bring a class back, in words and tables: of one run, and of several with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import interpreting, read_object
from .blocks import Block, Picture, Section, Text, figures_table
from .curves import COLOURS, new_figure, save_figure
from .render import write_document

PICTURE = "robustness.png"
# Networks in the order of their rows, with their names.
NAMES = {
    "run": "this run",
    "relabel": "relabelled: nothing is trained",
    "control": "never saw the class",
    "scratch": "fresh weights",
}
WHAT = (
    "Steps of fine-tuning until half of the images that are requested as a forgotten class are of it again (UA of "
    "50 %), interpolated linearly between the measurements, by the attack that takes the fewest; and the images that "
    "the training has seen by then. “> 100”: not within the 100 steps that were tried; how many it takes is unknown."
)


def _number(cost: Mapping[str, Any] | None, key: str) -> str:
    if cost is None:
        return "-"
    return f"> {cost[key]:.0f}" if cost["censored"] else f"{cost[key]:.1f}"


def cost_blocks(result: Mapping[str, Any], titles: Mapping[str, str] = NAMES, what: str = WHAT) -> list[Block]:
    """The costs of one run; of a robustness.json of an earlier version, which lacks them, nothing.

    ``titles``: network to its title; ``what``: what a cost is.
    """
    cost = result.get("cost")
    if cost is None:
        return []
    verdicts = [Text(verdict["text"]) for verdict in cost["verdicts"].values()]
    notes = [Text(note) for note in result["protocol"].get("notes", ())]
    table = [["network", "steps to half", "images to half", "strongest attack"]]
    table += [
        [title, _number(cost["networks"][name], "steps"), _number(cost["networks"][name], "images"),
         cost["networks"][name]["attack"]]
        for name, title in titles.items()
        if name in cost["networks"]
    ]  # fmt: skip
    shown = [name for name in titles if name in cost["by_attack"]]
    attacks = list(dict.fromkeys(row["attack"] for name in shown for row in cost["by_attack"][name]))
    rows = [["attack: steps to half", *(titles[name] for name in shown)]]
    for attack in attacks:
        of = [next((row for row in cost["by_attack"][name] if row["attack"] == attack), None) for name in shown]
        rows.append([attack, *(_number(row, "steps") for row in of)])
    return [*verdicts, *notes, Text(what), figures_table(table), figures_table(rows)]


def _interval(mean: Mapping[str, Any], censored: int) -> str:
    text = f"{'≥ ' if censored else ''}{mean['mean']:.1f}"
    return text if mean["low"] is None else f"{text} ({mean['low']:.1f} to {mean['high']:.1f})"


def _cells(costs: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    cells = []
    for name in names:
        cost = costs.get(name)
        if cost is None:
            cells.append("-")
            continue
        never = f", never in {cost['censored']} of {cost['count']}" if cost["censored"] else ""
        cells.append(_interval(cost["steps"], cost["censored"]) + never)
    return cells


def draw_costs(groups: Mapping[str, Any], path: Path) -> None:
    """Draws the mean steps of each group and of what it is compared with, each run as a dot, intervals as bars."""
    canvas, axes = new_figure(1, 1)
    panel = axes[0][0]
    names = [name for name in NAMES if name != "scratch" and any(name in group["costs"] for group in groups.values())]
    for number, name in enumerate(names):
        label = NAMES[name]
        for place, group in enumerate(groups.values()):
            cost = group["costs"].get(name)
            if cost is None:
                continue
            y = place + 0.22 * (number - (len(names) - 1) / 2)
            for one in cost["each"]:
                marker = ">" if one["censored"] else "."
                panel.plot(one["steps"], y, marker, color=COLOURS[number], alpha=0.5, markersize=5)
            steps = cost["steps"]
            spread = None if steps["low"] is None else [[steps["mean"] - steps["low"]], [steps["high"] - steps["mean"]]]
            panel.errorbar(steps["mean"], y, xerr=spread, fmt="o", color=COLOURS[number], capsize=3, label=label)
            label = None
    panel.set_yticks(range(len(groups)), list(groups))
    panel.invert_yaxis()
    panel.set_xlabel("Steps until half of the images are of the class again")
    panel.grid(alpha=0.3, axis="x")
    handles, labels = panel.get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    save_figure(canvas, path)


def write_robustness_across(folder: Path) -> Path:
    """Writes the report of a robustness.json over several runs: robustness.md, robustness.html and robustness.png.

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
    groups, recipe = result["groups"], result["relearn"]
    shown = [name for name in NAMES if any(name in group["costs"] for group in groups.values())]
    blocks: list[Block] = []
    for name, group in groups.items():
        blocks += [Text(f"{name}: {verdict['text']}") for verdict in group["verdicts"].values()]
    blocks += map(Text, result["notes"])
    if result["without_costs"]:
        blocks.append(Text(f"Without costs, from an earlier version: {', '.join(result['without_costs'])}."))
    own = {**NAMES, "run": "its runs"}
    steps = [["steps to half, mean and 95 % interval", "runs", *(own[name] for name in shown)]]
    images = [["images to half", *(own[name] for name in shown)]]
    for name, group in groups.items():
        steps.append([name, str(len(group["runs"])), *_cells(group["costs"], shown)])
        cells = [group["costs"].get(network) for network in shown]
        images.append([name, *("-" if c is None else _interval(c["images"], c["censored"]) for c in cells)])
    how = (
        f"{recipe['images']} real images of each forgotten class, all of them in every step. Intervals are Student's "
        "at 95 %; a mean of which some values are bounds is a bound (≥) and has none. Differences are paired by seed."
    )
    blocks += [Text(WHAT), Text(how), figures_table(steps), figures_table(images)]
    blocks.append(
        Picture(PICTURE, "Steps until the class is back, of each run and network", "Arrows: not within the steps.")
    )
    sections = [Section("What it costs to bring the class back", blocks)]
    for name, group in groups.items():
        rows = [["attack: steps to half", *(own[network] for network in shown), *_compared(group).values()]]
        for attack, of in group["attacks"].items():
            relations = [of["verdicts"].get(network, {}).get("relation", "-") for network in _compared(group)]
            rows.append([attack, *_cells(of["costs"], shown), *relations])
        sections.append(Section(f"By attack: {name}", [figures_table(rows)]))
    draw_costs(groups, folder / PICTURE)
    return write_document(folder, "What it costs to bring the class back", sections, "robustness")


def _compared(group: Mapping[str, Any]) -> dict[str, str]:
    """The networks that a group is compared with, as heads of columns."""
    return {name: f"against {NAMES[name]}" for name in group["verdicts"]}
