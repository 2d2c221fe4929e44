"""``pecker-fast compare``: several methods over several seeds on one preset, in one command that can be interrupted."""

import dataclasses
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from ..parallel import started_by_torchrun
from ..report import Run, text_table, write_across
from ..unlearning import method_class
from .unlearn import UnlearnArguments, unlearn
from .unlearn_text import UnlearnTextArguments

# What makes two runs the same one; how often a log was written does not.
SAME = ("method", "preset", "seed", "forget_classes", "cover_class", "samples_per_class", "options", "judge")
SAME += ("pretrained_model_name_or_path", "checkpoint_state", "mixed_precision", "initial_generator", "initial_score")


def compare(
    methods: tuple[str, ...] = ("pecker", "pecker+", "sfd"),
    preset: str = "digits",
    seeds: int = 3,
    first_seed: int = 0,
    forget_classes: tuple[int, ...] | None = None,
    cover_class: str | None = None,
    output_dir: str | None = None,
    pretrained_model_name_or_path: str | None = None,
    max_train_steps: int | None = None,
    samples_per_class: int | None = None,
    judge: str | None = None,
    set: tuple[str, ...] = (),
    keep_checkpoints: bool = False,
    progress_bar: bool = True,
) -> None:
    """Runs methods over seeds and writes a table with means and spreads, curves, and the figures of each run.

    The same command again goes on where it was interrupted; runs that have ended are read, not repeated.

    Args:
        methods: Names of methods, with spaces or commas between: pecker, pecker+, sfd, retrain, salun,
            selective_amnesia, esd.
        preset: digits, cifar10 or stl10.
        seeds: How many seeds each method is run on.
        first_seed: The first of them.
        forget_classes: Classes to forget; the preset's by default.
        cover_class: What is to be drawn in their place, or "random"; the preset's by default.
        output_dir: Folder of the comparison; runs/compare-<preset> by default.
        pretrained_model_name_or_path: The network to start from; the one that comes with the preset by default.
        max_train_steps: Iterations of each method; the method's by default.
        samples_per_class: Images of each class in an evaluation; the preset's by default.
        judge: File of the classifier for the evaluation; the one that comes with the preset by default.
        set: Options for all methods that have them, as name=value, such as generator_learning_rate=1e-4.
        keep_checkpoints: Keep the checkpoints of runs that have ended.
        progress_bar: Show a progress bar.
    """
    if started_by_torchrun():
        raise ValueError("compare runs in one process: pecker-fast unlearn is the command for torchrun")
    names = [name for item in methods for name in item.split(",") if name]
    if not names or len({*names}) < len(names):
        raise ValueError(f"methods is {', '.join(names) or 'empty'}, expected each method once")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected at least 1")
    folder = Path(output_dir or f"runs/compare-{preset}")
    given = dict(assignment(item) for item in set)
    if max_train_steps is not None:
        given["max_train_steps"] = max_train_steps
    request = {
        "forget_classes": forget_classes,
        "cover_class": cover_class,
        "pretrained_model_name_or_path": pretrained_model_name_or_path,
        "samples_per_class": samples_per_class,
        "judge": judge,
    }
    request = {name: value for name, value in request.items() if value is not None}
    plan: dict[str, list[UnlearnArguments]] = {name: [] for name in names}
    # All of them are made before the first is run: what is wrong is said at once.
    for seed in range(first_seed, first_seed + seeds):
        for name in names:
            plan[name].append(
                _arguments(preset, name, seed, folder / f"{name}-seed{seed}", request, given, progress_bar)
            )
    unknown = [key for key in given if not any(hasattr(args[0].options, key) for args in plan.values())]
    if unknown:
        raise ValueError(f"set has {unknown[0]}, which is an option of none of {', '.join(names)}")
    for args in (of[0] for of in plan.values()):
        args.options.check(1000)
    for several in plan.values():
        for args in several:
            ended(args)
    try:
        _run(plan, seeds, keep_checkpoints)
    except SystemExit:
        print("the same command again goes on here")
        raise
    runs = {name: [Run.read(args.output_dir) for args in several] for name, several in plan.items()}
    first = next(iter(plan.values()))[0].request
    cover = "a retained class drawn at random" if first.cover_class == "random" else f"class {first.cover_class}"
    classes = ", ".join(map(str, first.forget_classes))
    facts = {name: _facts(plan[name][0], runs[name][0]) for name in names}
    command = shlex.join(["pecker-fast", *sys.argv[1:]]) if sys.argv[1:2] == ["compare"] else "pecker-fast compare"
    asked = f"Preset `{preset}`: forget class {classes}, with {cover} as cover."
    report = write_across(folder, runs, asked=asked, command=command, facts=facts)
    print(text_table(runs))
    print(f"report: {report}")


def _run(plan: dict[str, list[UnlearnArguments]], seeds: int, keep_checkpoints: bool) -> None:
    """Runs what has not ended, seed by seed, so that an interruption leaves whole comparisons."""
    total, done = seeds * len(plan), 0
    for i in range(seeds):
        before = None
        for name, several in plan.items():
            args = several[i]
            done += 1
            if ended(args):
                continue
            print(f"[{done} of {total}] {name}, seed {args.compute.seed}")
            if any((args.output_dir / "checkpoints").glob("checkpoint-*")):
                args = dataclasses.replace(args, loop=dataclasses.replace(args.loop, resume_from_checkpoint="latest"))
            before = unlearn(args, before).before
            if not keep_checkpoints:
                shutil.rmtree(args.output_dir / "checkpoints", ignore_errors=True)


def _facts(args: UnlearnArguments, run: Run) -> dict[str, str]:
    """What the table says of a method in words."""
    needs_data = method_class(args.method).needs_data(args.options)
    sampler = str(run.metrics.get("sampler", "-")).replace("_", " ")
    return {"data-free": "no" if needs_data else "yes", "sampler": sampler}


def assignment(item: str) -> tuple[str, Any]:
    """Name and value of "name=value", the value as JSON or else as text. ValueError for anything else."""
    name, equals, value = item.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"set has {item!r}, expected name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _arguments(
    preset: str, name: str, seed: int, folder: Path, request: dict[str, Any], given: dict[str, Any], progress_bar: bool
) -> UnlearnArguments:
    base = UnlearnArguments.defaults(preset, name)
    options = dataclasses.replace(base.options, **{k: v for k, v in given.items() if hasattr(base.options, k)})
    request = dataclasses.replace(
        base.request, output_dir=str(folder), progress_bar=progress_bar, overwrite_output_dir=True, **request
    )
    return dataclasses.replace(
        base, options=options, request=request, compute=dataclasses.replace(base.compute, seed=seed)
    )


def ended(args: UnlearnArguments | UnlearnTextArguments, same: tuple[str, ...] = SAME) -> bool:
    """Whether the run has ended. ValueError where its folder has another one, in one of the settings ``same``."""
    folder = args.output_dir
    if not (folder / "config.json").is_file():
        return False
    there, here = json.loads((folder / "config.json").read_text()), json.loads(json.dumps(args.describe()))
    different = [key for key in same if there.get(key) != here.get(key)]
    if different:
        raise ValueError(f"{folder} has a run with another {', '.join(different)}: choose another output_dir")
    return (folder / "metrics.json").is_file()
