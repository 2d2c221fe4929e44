"""The figures of a robustness test: the main ones by flat names, and what it costs to bring the class back."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..robustness import INVERSION, Cost, Verdict, compare_costs, costs_of, strongest

# The networks that are attacked on the forgotten class, by their name in robustness.json.
NETWORKS = ("run", "relabel", "control", "scratch")
# What a run is compared with, in words.
THAN = {"relabel": "after relabelling", "control": "in a network that never saw it"}


def cost_record(rows: Sequence[Mapping[str, Any]], what: str = "class") -> dict[str, Any]:
    """What it costs to bring the class back, as JSON.

    Parameters
    ----------
    rows : sequence of mapping
        The rows of relearning.
    what : str
        What is forgotten: "class" or "concept".

    Returns
    -------
    dict
        "networks", from each network to the cost of the strongest attack (``Cost.json``); "by_attack", from each to
        those of all attacks; and "verdicts", from each network that the run is compared with to ``Verdict.json``.
    """
    by_attack = {name: costs_of(rows, name) for name in NETWORKS}
    by_attack = {name: costs for name, costs in by_attack.items() if costs}
    best = {name: strongest(costs) for name, costs in by_attack.items()}
    return {
        "networks": {name: cost.json() for name, cost in best.items()},
        "by_attack": {name: [cost.json() for cost in costs] for name, costs in by_attack.items()},
        "verdicts": verdicts({name: {"": cost} for name, cost in best.items()}, what),
    }


def verdicts(costs: Mapping[str, Mapping[str, Cost]], what: str = "class") -> dict[str, Any]:
    """From each network that runs are compared with to a verdict; ``costs``: network to run to cost."""
    compared: dict[str, Verdict | None] = {
        name: compare_costs(costs["run"], costs[name], than, what) for name, than in THAN.items() if name in costs
    }
    return {name: verdict.json() for name, verdict in compared.items() if verdict is not None}


def costs_summary(record: Mapping[str, Any]) -> dict[str, float]:
    """The main figures of a ``cost_record``, by flat names; without those of which only a bound is known."""
    figures = {}
    for network, name in (("run", "relearn"), ("relabel", "relabel"), ("control", "control")):
        cost = record["networks"].get(network)
        # Of an attack that did not get there, only a bound is known.
        if cost is not None and not cost["censored"]:
            figures[f"{name}_steps_to_half"] = cost["steps"]
            if network == "run":
                figures["relearn_images_to_half"] = cost["images"]
    for network, verdict in record["verdicts"].items():
        if verdict["ratio"] is not None:
            figures[f"cost_over_{network}"] = verdict["ratio"]
    return figures


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The main figures of the tests that were run, by flat names: percent, but for Fréchet distances."""
    figures: dict[str, float] = {}
    rows = result.get("relearn", [])
    for step in sorted({row["step"] for row in rows}):
        for network, data, name in (
            ("run", "forgotten", "relearn_forget"),
            ("run", "retained", "relearn_retained"),
            ("scratch", "forgotten", "relearn_scratch"),
            ("control", "forgotten", "relearn_control"),
        ):
            matching = [r for r in rows if (r["network"], r["data"], r["step"]) == (network, data, step)]
            if matching and step:
                # The attack that gets furthest, and what it leaves of the other classes.
                worst = min(matching, key=lambda row: row["ua"])
                figures[f"{name}_ua_{step}"] = worst["ua"]
                figures[f"{name}_retain_accuracy_{step}"] = worst["retain_accuracy"]
                distances = [row["forget_frechet"] for row in matching if row.get("forget_frechet") is not None]
                if distances:
                    figures[f"{name}_frechet_{step}"] = min(distances)
    figures |= costs_summary(result["cost"]) if "cost" in result else {}
    for row in result.get("latent", []):
        prefix = {"run": "latent", "pretrained": "latent_pretrained", "control": "latent_control"}[row["network"]]
        name = row["group"].replace("forgotten by its label", "own").replace("forgotten by retained labels", "other")
        if name in ("own", "other"):
            figures[f"{prefix}_{name}_found"] = row["found"]
            figures[f"{prefix}_{name}_confirmed"] = row["confirmed"]
        elif row["network"] == "run" and row["group"] == "retained by another label":
            figures["latent_retained_other_confirmed"] = row["confirmed"]
    rows = result.get("neighbours", [])
    if rows:
        drops = {
            near: [r["accuracy_before"] - r["accuracy"] for r in rows if r["neighbour"] == near]
            for near in (True, False)
        }
        figures["neighbour_drop"] = sum(drops[True]) / len(drops[True])
        if drops[False]:
            figures["others_drop"] = sum(drops[False]) / len(drops[False])
        figures["worst_retained_accuracy"] = min(row["accuracy"] for row in rows)
        figures["retained_called_forgotten"] = sum(row["called_forgotten"] for row in rows) / len(rows)
    for name in ("guidance", "paths"):
        still = [row["still"] for row in result.get(name, []) if row["network"] == "run"]
        if still:
            figures[f"{name}_still_most"] = max(still)
    return figures


def costs_of_prompts(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """What it costs to bring a concept back in a text-to-image model.

    Fine-tuning and inversion are tried for different numbers of steps and train different things, so each has costs and
    verdicts of its own.

    Parameters
    ----------
    rows : sequence of mapping
        The rows of all attacks.

    Returns
    -------
    dict
        "cost" of fine-tuning and "inversion_cost", as of ``cost_record``, of those that were tried.
    dict
        The main figures by flat names.
    """
    costs: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for key, inverted in (("cost", False), ("inversion_cost", True)):
        own = [row for row in rows if (row["attack"] == INVERSION) == inverted]
        if not own:
            continue
        costs[key] = cost_record(own, "concept")
        summary = costs_summary(costs[key])
        if inverted:
            renamed = {"relearn_steps_to_half": "inversion_steps_to_half"}
            summary = {
                renamed.get(name, f"inversion_{name}"): value
                for name, value in summary.items()
                if name != "relearn_images_to_half"
            }
        figures |= summary
        for step in sorted({row["step"] for row in own if row["step"]}):
            uas = [row["ua"] for row in own if (row["network"], row["step"]) == ("run", step)]
            figures[f"{'inversion' if inverted else 'relearn_forget'}_ua_{step}"] = min(uas)
    return costs, figures
