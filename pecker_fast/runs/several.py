"""What the commands that make several runs share: their arguments, and whether a run has ended."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from ..report import portable
from ..training.retired import without_retired
from .options import DataArguments
from .unlearn import UnlearnArguments

# What makes two runs the same one; how often a log was written does not.
SAME = ("method", "preset", "seed", "forget_classes", "cover_class", "samples_per_class", "options", "judge")
SAME += ("pretrained_model_name_or_path", "checkpoint_state", "mixed_precision", "initial_generator", "initial_score")
SAME += ("dataset_name",)


def assignment(item: str) -> tuple[str, Any]:
    """Name and value of "name=value", the value as JSON where it is any. ValueError for anything else."""
    name, equals, value = item.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"set has {item!r}, expected name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def command_line(*words: str) -> str:
    """The command that this process was started with, as a report may say it: without places on this machine. Where it
    was another one, as in a test or from Python, ``words``, the subcommand and what it cannot do without."""
    given = sys.argv[1:] if sys.argv[1:2] == [words[0]] else words
    return shlex.join(["pecker-fast", *portable(given)])


def run_arguments(
    preset: str,
    name: str,
    seed: int,
    folder: Path,
    request: dict[str, Any],
    given: dict[str, Any],
    progress_bar: bool,
    data: DataArguments | None = None,
    device: str | None = None,
) -> UnlearnArguments:
    """The arguments of method ``name``; of the options ``given`` it takes those that it has."""
    base = UnlearnArguments.defaults(preset, name)
    options = dataclasses.replace(base.options, **{k: v for k, v in given.items() if hasattr(base.options, k)})
    request = dataclasses.replace(
        base.request, output_dir=str(folder), progress_bar=progress_bar, overwrite_output_dir=True, **request
    )
    compute = dataclasses.replace(base.compute, seed=seed, device=device)
    return dataclasses.replace(base, options=options, request=request, compute=compute, data=data or base.data)


def check_given(given: dict[str, Any], plan: list[UnlearnArguments]) -> None:
    """Raises ValueError for an option that none of the methods has."""
    unknown = [key for key in given if not any(hasattr(args.options, key) for args in plan)]
    if unknown:
        names = ", ".join(dict.fromkeys(args.method for args in plan))
        raise ValueError(f"set has {unknown[0]}, which is an option of none of {names}")


def ended(args: UnlearnArguments, more: tuple[str, ...] = ()) -> bool:
    """Whether the run has ended. ValueError where its folder has another one.

    ``more``: what else of config.json has to be the same.
    """
    folder = args.output_dir
    if not (folder / "config.json").is_file():
        return False
    there = without_retired(json.loads((folder / "config.json").read_text()))
    here = json.loads(json.dumps(args.describe()))
    different = [key for key in (*SAME, *more) if there.get(key) != here.get(key)]
    if different:
        raise ValueError(f"{folder} has a run with another {', '.join(different)}: choose another output_dir")
    return (folder / "metrics.json").is_file()


def going_on(args: UnlearnArguments) -> UnlearnArguments:
    """The same run, from its last checkpoint where there is one."""
    if not any((args.output_dir / "checkpoints").glob("checkpoint-*")):
        return args
    return dataclasses.replace(args, loop=dataclasses.replace(args.loop, resume_from_checkpoint="latest"))
