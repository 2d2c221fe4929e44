"""What the model that a run on prompts started from draws: measured as the run is, and remembered for other runs."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...figures import BEFORE, find
from .evaluation import PromptEvaluation

# Figures that say how much was drawn, not what was measured.
COUNTS = ("measured_images", "near_measured_images", "coco_images")


@dataclass(frozen=True, kw_only=True)
class StartEvaluation(PromptEvaluation):
    """An evaluation of the model that a run started from.

    Parameters
    ----------
    of : dict
        config.json of the run: its concepts and prompts are measured.
    """

    of: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return self.of


def start_of(args: PromptEvaluation) -> StartEvaluation | None:
    """The evaluation of the model that the run of ``args`` started from; None if it is no run, or does not say.

    That is its one-step generator if it was given one, and otherwise the pretrained model, drawn by DDIM.
    """
    config = args.config
    base, generator = config.get("pretrained_model_name_or_path"), config.get("initial_generator")
    if base is None:
        return None
    # A folder of pecker-fast distil has all parts, and says how it draws.
    path, other = (generator, base) if generator is not None else (config.get("distilled") or base, None)
    t_init = (config.get("options") or {}).get("t_init") if generator is not None else None
    sampler = "auto" if t_init is None else "one_step"
    own = {item.name: getattr(args, item.name) for item in dataclasses.fields(PromptEvaluation)}
    own |= {"run": path, "pretrained_model_name_or_path": None, "base": other, "before": None, "output": None}
    return StartEvaluation(**{**own, "sampler": sampler, "t_init": t_init, "measure_before": False, "of": config})


def folder_of(run: Path, config: Mapping[str, Any]) -> Path:
    """Where the images of a run's start are kept: a folder beside the run that all runs from these weights share."""
    weights = [config.get(name) for name in ("pretrained_sha256", "initial_generator_sha256", "distilled")]
    key = hashlib.sha256(json.dumps([*weights, config.get("pretrained_model_name_or_path")]).encode()).hexdigest()
    return run.parent / f"before-{key[:12]}"


def measure_before(args: PromptEvaluation, figures: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the model that a run started from with the run's prompts, seeds and detectors.

    Its images are drawn once, by whichever run is measured first.

    Parameters
    ----------
    args : PromptEvaluation
        Of the run.
    figures : dict
        The figures of the run. Those that its start has as well are returned.

    Returns
    -------
    tuple of dict
        The figures with "before_" in front of their keys, and how they were measured, as JSON. Both are empty if
        ``args`` measures no run, or if its start is not there any more, which a line on stderr says.

    Raises
    ------
    ValueError
        If ``args.measure_before`` is True, and there is nothing to measure.
    """
    start = start_of(args)
    if start is None:
        if args.measure_before:
            raise ValueError("measure_before is set, but what is measured is no run that says what it started from")
        return {}, {}
    folder = folder_of(Path(args.path), args.config)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        measured, protocol = start.measure(folder / "evaluation.json")
    except (ValueError, OSError) as error:
        if args.measure_before:
            raise
        print(f"pecker-fast: not measured before the run: {error}", file=sys.stderr)
        return {}, {}
    shared = [name for name in figures if name not in COUNTS and find(name) is not None]
    before = {f"{BEFORE}{name}": measured[name] for name in shared if isinstance(measured.get(name), (int, float))}
    return before, {"model": start.path, "base": start.base, "samples": protocol["samples"]}
