"""Several runs planned together: their options, which of them have ended, and how the others are resumed."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..parallel import started_by_torchrun
from ..report import portable
from ..run_records import read_config
from ..training.retired import without_retired
from .arguments import UnlearnArguments, option_groups, with_options
from .distilled import with_distilled
from .history import started_words
from .task import task_of, unlearn_arguments


def check_alone(command: str, instead: str = "pecker-fast unlearn is the command for torchrun") -> None:
    """Raise ValueError under torchrun: several runs are made in one process."""
    if started_by_torchrun():
        raise ValueError(f"{command} runs in one process: {instead}")


def check_place(command: str, folder: Path) -> None:
    """Check that several runs may be reported in ``folder``: nothing of another kind would lose its report.

    Raises
    ------
    ValueError
        If it is a file, or has a single run, or a sequence if ``command`` makes none, or a comparison if it does.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file, expected a folder")
    other = ("a comparison", "compare.json") if command == "sequence" else ("a sequence", "sequence.json")
    for kind, name in (("a run", "config.json"), other):
        if (folder / name).is_file():
            raise ValueError(f"output_dir {folder} has {kind}, whose report would be lost: choose another folder")


def assignment(item: str) -> tuple[str, Any]:
    """Split "name=value"; the value is parsed as JSON if it is JSON.

    Raises
    ------
    ValueError
        If it is not of this form.
    """
    name, equals, value = item.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"set has {item!r}, expected name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def command_line(*words: str) -> str:
    """The command that this process was started with, without paths on this machine, as a report shows it.

    From Python, or if it was another command, ``words``: the subcommand and its essential options.
    """
    return shlex.join(["pecker-fast", *portable(started_words(words))])


def run_arguments(
    preset: str, method: str, seed: int, folder: Path, options: Mapping[str, Any], shared: Mapping[str, Any]
) -> UnlearnArguments:
    """The options of one run among several.

    Parameters
    ----------
    preset, method : str
        Names of both.
    seed : int
        Of the run.
    folder : Path
        Of the run.
    options : Mapping
        Options by name that every run has.
    shared : Mapping
        Options by name of which the run takes those that its method has; see ``check_shared``.
    """
    fixed = {"seed": seed, "output_dir": str(folder), "overwrite_output_dir": True}
    args = unlearn_arguments(preset, method, {**options, **fixed})
    names = _settable(args)
    return with_options(args, {name: value for name, value in shared.items() if name in names})


def check_shared(shared: Mapping[str, Any], plan: Sequence[UnlearnArguments], names: Sequence[str] = ()) -> None:
    """Raise ValueError for an option that no run of ``plan`` takes; ``names``: what is compared, for the message."""
    unknown = [name for name in shared if not any(name in _settable(args) for args in plan)]
    if unknown:
        known = ", ".join(names or dict.fromkeys(args.method for args in plan))
        raise ValueError(f"set has {unknown[0]}, which is an option of none of {known}")


def _settable(args: UnlearnArguments) -> set[str]:
    """The options that ``compare --set`` may change."""
    allowed = task_of(args).settable
    return {name for name, group in option_groups(args).items() if group in allowed or name in allowed}


def ended(args: UnlearnArguments) -> bool:
    """Whether the run has ended.

    Raises
    ------
    ValueError
        If its folder has another run; the message names the options that differ.
    """
    args = with_distilled(args)
    folder, kind = args.folder, task_of(args)
    if not (folder / "config.json").is_file():
        return False
    recorded = without_retired(read_config(folder))
    config = without_retired(json.loads(json.dumps(kind.describe(args))))
    different = [key for key in kind.same if recorded.get(key) != config.get(key)]
    if different:
        raise ValueError(f"{folder} has a run with another {', '.join(different)}: choose another output_dir")
    return (folder / "metrics.json").is_file()


def resumed(args: UnlearnArguments) -> UnlearnArguments:
    """The same run, resumed from its last checkpoint if it has one."""
    if not any((args.folder / "checkpoints").glob("checkpoint-*")):
        return args
    return dataclasses.replace(args, loop=dataclasses.replace(args.loop, resume_from_checkpoint="latest"))
