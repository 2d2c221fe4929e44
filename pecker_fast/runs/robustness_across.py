"""What it costs to bring the class back over several runs: means over the seeds with intervals, and verdicts."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from ..metrics.intervals import interval
from ..records import RecordError
from ..report import portable, write_robustness_across
from ..robustness import Cost, mean_steps
from ..run_records import read_config, read_file
from .robustness_figures import NETWORKS, verdicts

# What a comparison leaves in its folder.
COMPARED = "compare.json"
# "sfd-seed0" is a run of "sfd".
_OF_SEED = re.compile(r"(.+)-seed\d+")


def run_folders(paths: Sequence[str] | str, output_dir: str | None) -> tuple[list[Path], Path | None]:
    """The folders of runs, and that of a report over them.

    Parameters
    ----------
    paths : sequence of str
        Folders of runs and of comparisons.
    output_dir : str or None
        Folder of the report; by default that of the comparison, or the one that all runs are in.

    Returns
    -------
    list of Path
        Each run once.
    Path or None
        None for a single run, which has a report of its own.

    Raises
    ------
    ValueError
        If there is no run, or the runs are in several folders and ``output_dir`` is None.
    """
    paths = [paths] if isinstance(paths, str) else list(paths)
    if not paths:
        raise ValueError("run is empty, expected the folder of a run or of a comparison")
    folders: list[Path] = []
    several = len(paths) > 1
    for path in map(Path, paths):
        inside = _runs_in(path) if (path / COMPARED).is_file() else []
        several = several or bool(inside)
        folders += inside or [path]
    folders = list(dict.fromkeys(folders))
    if not several:
        if output_dir is not None:
            raise ValueError(f"output_dir is {output_dir!r}, but there is one run, whose folder has its report")
        return folders, None
    parents = {folder.parent for folder in folders}
    if output_dir is None and len(parents) > 1:
        raise ValueError("output_dir is not given, and the runs are in several folders: expected one for the report")
    return folders, Path(output_dir) if output_dir is not None else parents.pop()


def _runs_in(folder: Path) -> list[Path]:
    """The folders of runs on classes directly in that of a comparison."""
    runs = []
    for path in sorted(folder.iterdir()):
        try:
            config = read_config(path)
        except RecordError:
            continue
        if "forget_classes" in config and (path / "unet").is_dir():
            runs.append(path)
    return runs


def name_of(folder: Path, method: str) -> str:
    """What a run is one seed of."""
    match = _OF_SEED.fullmatch(folder.resolve().name)
    return match[1] if match else method


def write_across_runs(place: Path, folders: Sequence[Path]) -> tuple[Path, list[str]]:
    """Write robustness.json, .md, .html and .png over runs that have been attacked.

    Parameters
    ----------
    place : Path
        The folder to write into.
    folders : sequence of Path
        The runs. Those without costs, which an earlier version attacked, are left out and named.

    Returns
    -------
    Path
        Of robustness.md.
    list of str
        A line of words for each group of runs and each network that it is compared with.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    without, notes = [], dict[str, None]()
    for folder in folders:
        record = read_file(folder, "robustness")
        if "cost" not in record:
            without.append(folder.name)
            continue
        notes |= dict.fromkeys(record["protocol"].get("notes", []))
        group = groups.setdefault(name_of(folder, str(record["method"])), {})
        group[str(folder)] = {**record, "folder": folder.name}
    if not groups:
        raise ValueError(f"run has no run that relearning was tested on: {', '.join(without) or 'none'}")
    result = {
        "groups": {name: _group(records) for name, records in groups.items()},
        "without_costs": without,
        "notes": list(notes),
        "relearn": next(iter(next(iter(groups.values())).values()))["protocol"]["relearn"],
    }
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / "robustness.json", portable(result))
    lines = [
        f"{name}: {verdict['text']}"
        for name, group in result["groups"].items()
        for verdict in group["verdicts"].values()
    ]
    return write_robustness_across(place), lines


def _group(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The costs of runs that differ in their seed, as JSON."""
    best: dict[str, dict[str, Cost]] = {}
    attacks: dict[str, dict[str, dict[str, Cost]]] = {}
    for run, record in records.items():
        for network in NETWORKS:
            if network in record["cost"]["networks"]:
                best.setdefault(network, {})[run] = Cost.of(record["cost"]["networks"][network])
            for cost in map(Cost.of, record["cost"]["by_attack"].get(network, [])):
                attacks.setdefault(cost.attack, {}).setdefault(network, {})[run] = cost
    return {
        "runs": [record["folder"] for record in records.values()],
        "seeds": [record["protocol"]["seed"] for record in records.values()],
        "costs": {network: _mean(costs) for network, costs in best.items()},
        "verdicts": verdicts(best),
        "attacks": {
            attack: {
                "costs": {network: _mean(costs) for network, costs in of.items()},
                "verdicts": verdicts(of) if "run" in of else {},
            }
            for attack, of in attacks.items()
        },
    }


def _mean(costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Mean steps and images with 95 % intervals; lower bounds if ``censored`` of the runs are."""
    steps, images = mean_steps(costs.values()), interval([cost.images for cost in costs.values()])
    exact = steps.censored == 0
    return {
        "steps": {"mean": steps.mean, "low": steps.low, "high": steps.high},
        "images": {
            "mean": images.mean,
            "low": images.low if exact else None,
            "high": images.high if exact else None,
        },
        "count": steps.count,
        "censored": steps.censored,
        "attacks": sorted({cost.attack for cost in costs.values()}),
        "each": [cost.json() for cost in costs.values()],
    }
