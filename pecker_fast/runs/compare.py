"""``pecker-fast compare``: several methods over several seeds on one preset, in one command that can be interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..hashing import file_sha256
from ..metrics import check_inception_weights
from ..parallel import started_by_torchrun
from ..report import Run, read_across, text_table, write_across
from ..training.presets import preset as find_preset
from ..unlearning import method_class
from .evaluate import evaluate
from .options import DataArguments
from .robustness import robustness as attack
from .several import assignment, check_given, command_line, ended, going_on, run_arguments
from .unlearn import UnlearnArguments, unlearn


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
    inception_weights: str | None = None,
    final_samples_per_class: int | None = None,
    dataset_name: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    set: tuple[str, ...] = (),
    keep_checkpoints: bool = False,
    robustness: bool = False,
    seconds: bool = True,
    runs: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Runs methods over seeds and writes a table with means and spreads, curves, and the figures of each run.

    The same command again goes on where it was interrupted; runs that have ended are read, not repeated.

    Args:
        methods: Names of methods, with spaces or commas between: pecker, pecker+, sfd, retrain, salun,
            selective_amnesia, esd.
        preset: digits, digits16, cifar10 or stl10.
        seeds: How many seeds each method is run on.
        first_seed: The first of them.
        forget_classes: Classes to forget; the preset's by default.
        cover_class: What is to be drawn in their place, or "random"; the preset's by default.
        output_dir: Folder of the comparison; runs/compare-<preset> by default.
        pretrained_model_name_or_path: The network to start from; the one that comes with the preset by default.
        max_train_steps: Iterations of each method; the method's by default.
        samples_per_class: Images of each class in an evaluation; the preset's by default.
        judge: File of the classifier for the evaluation; the one that comes with the preset by default.
        inception_weights: File of Inception's weights: each run is then measured by FID, sFID, IS, KID, precision and
            recall too, as pecker-fast evaluate does.
        final_samples_per_class: Images of each class for these; as published by default.
        dataset_name: digits, cifar10, stl10 or folder:<path>; the preset's by default.
        data_root: Folder with the files of cifar10 or stl10.
        device: cpu, cuda, cuda:1...; a GPU where there is one by default.
        set: Options for all methods that have them, as name=value, such as generator_learning_rate=1e-4.
        keep_checkpoints: Keep the checkpoints of runs that have ended.
        robustness: Attack every run (pecker-fast robustness) and show how the attacks fare.
        seconds: Show seconds. Leave them out where the machine did other things meanwhile.
        runs: Report the runs of this file instead, compare.json of an earlier report; nothing is run.
        progress_bar: Show a progress bar.
    """
    if started_by_torchrun():
        raise ValueError("compare runs in one process: pecker-fast unlearn is the command for torchrun")
    if runs is not None:
        read, said = read_across(Path(runs))
        folder = Path(output_dir) if output_dir else Path(runs).parent
        folder.mkdir(parents=True, exist_ok=True)
        _report(folder, read, seconds, **said)
        return
    names = [name for item in methods for name in item.split(",") if name]
    if not names or len({*names}) < len(names):
        raise ValueError(f"methods is {', '.join(names) or 'empty'}, expected each method once")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected at least 1")
    if inception_weights is not None:
        check_inception_weights(inception_weights)
    elif final_samples_per_class is not None:
        raise ValueError("final_samples_per_class is given, but not inception_weights, which it is for")
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
    parts = {"data": DataArguments(dataset_name, data_root), "device": device}
    plan: dict[str, list[UnlearnArguments]] = {name: [] for name in names}
    # All of them are made before the first is run: what is wrong is said at once.
    for seed in range(first_seed, first_seed + seeds):
        for name in names:
            plan[name].append(
                run_arguments(preset, name, seed, folder / f"{name}-seed{seed}", request, given, progress_bar, **parts)
            )
    check_given(given, [several[0] for several in plan.values()])
    for args in (of[0] for of in plan.values()):
        args.options.check()
    for several in plan.values():
        for args in several:
            ended(args)
    try:
        _run(plan, seeds, keep_checkpoints)
        if inception_weights is not None:
            _measure(plan, inception_weights, final_samples_per_class, progress_bar)
    except SystemExit:
        print("the same command again goes on here")
        raise
    if robustness:
        for args in (args for several in plan.values() for args in several):
            if not (args.output_dir / "robustness.json").is_file():
                print(f"robustness: {args.method}, seed {args.compute.seed}")
                attack(str(args.output_dir), progress_bar=progress_bar)
    found = {name: [Run.read(args.output_dir) for args in several] for name, several in plan.items()}
    first = next(iter(plan.values()))[0].request
    cover = "a retained class drawn at random" if first.cover_class == "random" else f"class {first.cover_class}"
    classes = ", ".join(map(str, first.forget_classes))
    facts = {name: _facts(plan[name][0], found[name][0]) for name in names}
    asked = f"Preset {preset}: forget class {classes}, with {cover} as cover."
    _report(folder, found, seconds, asked=asked, command=command_line("compare"), facts=facts)


def _report(folder: Path, runs: dict[str, list[Run]], seconds: bool, **said: Any) -> None:
    report = write_across(folder, runs, seconds=seconds, **said)
    print(text_table(runs, seconds))
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
            before = unlearn(going_on(args), before).before
            if not keep_checkpoints:
                shutil.rmtree(args.output_dir / "checkpoints", ignore_errors=True)


def _facts(args: UnlearnArguments, run: Run) -> dict[str, str]:
    """What the table says of a method in words."""
    needs_data = method_class(args.method).needs_data(args.options)
    sampler = str(run.metrics.get("sampler", "-")).replace("_", " ")
    return {"data-free": "no" if needs_data else "yes", "sampler": sampler}


def _measure(
    plan: dict[str, list[UnlearnArguments]], weights: str, samples_per_class: int | None, progress_bar: bool
) -> None:
    """Measures each run with Inception, unless it has been, in the same way. Features of the real images are kept for
    all runs together."""
    sha256 = file_sha256(weights)
    for args in (args for several in plan.values() for args in several):
        count = samples_per_class or find_preset(args.preset).final_samples_per_class or args.request.samples_per_class
        if _measured(args.output_dir, sha256, count):
            continue
        print(f"measured with Inception: {args.output_dir}")
        evaluate(
            str(args.output_dir),
            samples_per_class=count,
            inception_weights=weights,
            device=args.compute.device,
            features_dir=str(args.output_dir.parent / "features"),
            progress_bar=progress_bar,
        )


def _measured(folder: Path, sha256: str, samples_per_class: int) -> bool:
    protocol = json.loads((folder / "metrics.json").read_text()).get("protocol", {}).get("evaluation", {})
    return (
        protocol.get("image_quality", {}).get("weights_sha256") == sha256
        and protocol["samples"]["samples_per_class"] == samples_per_class
    )
