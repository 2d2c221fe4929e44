"""The contribution of the mask and of the other parts of PECKER and PECKER+, on the digits, over seeds.

``python -m pecker_fast.benchmarks.studies.ablate --study mask|plus``
"""

import dataclasses
import functools
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pecker_fast.diffusion.networks import unwrap
from pecker_fast.files import save_tensors, write_json
from pecker_fast.hashing import weights_hash
from pecker_fast.metrics import Evaluator, Judge, confusion_counts, load_judge, unlearning_accuracy
from pecker_fast.metrics.drift import total, trained_percent, weight_drift
from pecker_fast.parallel import World, started_by_torchrun
from pecker_fast.parsing import parse_call
from pecker_fast.records import read_lines
from pecker_fast.report import portable
from pecker_fast.runs.arguments import DataArguments, UnlearnArguments
from pecker_fast.runs.classes.data import load_images
from pecker_fast.runs.classes.task import ClassTask
from pecker_fast.runs.folder import owning, prepare_folder
from pecker_fast.runs.presets import class_preset
from pecker_fast.runs.several import assignment, check_shared, ended, resumed, run_arguments
from pecker_fast.training.loop import Loop, LoopOptions
from pecker_fast.unlearning import Method, Setting, method_class

from .ablation import AblationRun, read_ablation
from .ablation_report import write_ablation
from .conditions import NOTHING_FORGOTTEN, STUDIES, Condition, Study

PROGRAM = "python -m pecker_fast.benchmarks.studies.ablate"
# Every UA_STEPS iterations only the forgotten class is sampled and judged, every FULL_STEPS all classes.
UA_STEPS, FULL_STEPS = 2, 20
RETAINED = "retained.safetensors"


@dataclass(frozen=True)
class Planned:
    """A run of a study."""

    condition: Condition
    pair: tuple[int, int]
    args: UnlearnArguments

    @property
    def title(self) -> str:
        forgotten, cover = self.pair
        return f"{self.condition.name}, {forgotten} onto {cover}, seed {self.args.compute.seed}"


def ablate(
    study: str = "mask",
    preset: str = "digits",
    seeds: int = 5,
    first_seed: int = 0,
    pairs: tuple[str, ...] | None = None,
    conditions: tuple[str, ...] | None = None,
    output_dir: str | None = None,
    max_train_steps: int = 80,
    samples_per_class: int = 100,
    worker: str = "1/1",
    report_only: bool = False,
    runs: str | None = None,
    set: tuple[str, ...] = (),
) -> None:
    """Runs a study, one factor at a time over paired seeds, and writes tables with confidence intervals and plots.

    Running the same command again resumes an interrupted study. Finished runs are not repeated, and the two studies
    share the runs that they have in common. All conditions of a seed run before the next seed begins, so a partial
    study can already be compared. Several processes can share the work: --worker 1/2 and --worker 2/2.

    Args:
        study: mask (what the mask does) or plus (what PECKER+'s changes do).
        preset: digits or digits16, or another preset with a judge.
        seeds: Number of seeds for each condition.
        first_seed: The first seed.
        pairs: Forgotten class and cover class, as 0-1; the study's by default.
        conditions: Names of the study's conditions to run; all by default.
        output_dir: Folder of the study; runs/ablation-<preset> by default.
        max_train_steps: Iterations of each run; the learning rates fall over them.
        samples_per_class: Images of each class in an evaluation.
        worker: I/N: every N-th run, from the I-th.
        report_only: Only report the runs that have finished.
        runs: Report the runs in this file, the runs.jsonl of an earlier report; nothing is run.
        set: Options for all methods that have them, as name=value, such as train_batch_size=24.
    """
    if started_by_torchrun():
        raise ValueError("ablate runs in one process: --worker I/N shares its runs between several")
    if study not in STUDIES:
        raise ValueError(f"study is {study!r}, expected one of {', '.join(STUDIES)}")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected at least 1")
    chosen = STUDIES[study]
    place, workers = _worker(worker)
    folder = Path(output_dir or f"runs/ablation-{preset}")
    options = {**dict(assignment(item) for item in set), "max_train_steps": max_train_steps}
    classes = chosen.pairs if pairs is None else tuple(_pair(text) for text in pairs)
    every_seed = range(first_seed, first_seed + seeds)
    plan = list(_plan(chosen, preset, every_seed, classes, conditions, folder, options, samples_per_class))
    if not plan:
        raise ValueError(f"conditions {', '.join(conditions)} are of the pair {chosen.pairs[0]} alone")
    # An option may belong to a method of the study whose conditions are not selected.
    whole = _plan(chosen, preset, range(1), chosen.pairs[:1], None, folder, options, 1)
    check_shared(options, [run.args for run in whole])
    for run in plan:
        ClassTask.check(run.args)
        ended(run.args)
    if runs is not None:
        _report(chosen, study, folder, list(_from_file(Path(runs), chosen, preset, classes)))
        return
    if not report_only:
        _run([run for i, run in enumerate(plan) if i % workers == place])
    missing = [run for run in plan if not ended(run.args)]
    finished = [run for run in plan if ended(run.args)]
    if missing and not report_only:
        print(f"{len(missing)} of {len(plan)} runs are left to other workers; the last to finish writes the report")
        return
    if not finished:
        raise ValueError(f"{folder} has no run of this study that has finished")
    if missing:
        print(f"{len(missing)} of {len(plan)} runs are missing")
    _report(chosen, study, folder, [_read(run, preset) for run in finished])


def _from_file(path: Path, study: Study, preset: str, pairs: tuple[tuple[int, int], ...]) -> Iterator[AblationRun]:
    """The runs of a study in a file that may hold others too, in the order of the study's tables."""
    runs = [run for run in read_ablation(path) if run.preset == preset]
    for pair in pairs:
        for condition in study.of_pair(pair):
            for run in runs:
                if (run.pair, run.condition) == (f"{pair[0]}-{pair[1]}", condition.name):
                    yield dataclasses.replace(run, factor=condition.factor)


def _command(name: str) -> str:
    """The command of this process, without paths of this machine; the study's own if another program calls it."""
    is_main = Path(sys.argv[0]).resolve() == Path(__file__).resolve()
    return f"{PROGRAM} {shlex.join(portable(sys.argv[1:] if is_main else ['--study', name]))}"


def _report(study: Study, name: str, folder: Path, runs: list[AblationRun]) -> None:
    report = write_ablation(
        folder / name,
        runs,
        asked=study.asked,
        command=_command(name),
        default=study.default,
        frontier=study.frontier,
        reference=NOTHING_FORGOTTEN,
    )
    print(f"report: {report}")


def _worker(text: str) -> tuple[int, int]:
    """Place, from 0, and number of workers. ValueError unless the text is I/N with 1 <= I <= N."""
    place, slash, count = text.partition("/")
    if not (slash and place.isdecimal() and count.isdecimal() and 1 <= int(place) <= int(count)):
        raise ValueError(f"worker is {text!r}, expected I/N with I from 1 to N, such as 1/2")
    return int(place) - 1, int(count)


def _pair(text: str) -> tuple[int, int]:
    forgotten, dash, cover = text.partition("-")
    if not (dash and forgotten.isdecimal() and cover.isdecimal()):
        raise ValueError(f"pairs has {text!r}, expected forgotten and cover class, such as 0-1")
    return int(forgotten), int(cover)


def _plan(
    study: Study,
    preset: str,
    seeds: range,
    pairs: tuple[tuple[int, int], ...],
    names: tuple[str, ...] | None,
    folder: Path,
    options: dict[str, Any],
    samples_per_class: int,
) -> Iterator[Planned]:
    """All runs, seed by seed. ValueError for conditions that the study lacks, or a preset without a judge."""
    known = [condition.name for condition in study.of_pair(study.pairs[0])]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"conditions has {unknown[0]!r}, expected some of {', '.join(known)}")
    if class_preset(preset).judge is None:
        raise ValueError(f"preset is {preset!r}, which comes without a judge; expected digits or digits16")
    loop = LoopOptions(logging_steps=10, checkpointing_steps=10**6, checkpoints_total_limit=1)
    loop = dataclasses.replace(loop, validation_steps=UA_STEPS)
    for seed in seeds:
        for pair in pairs:
            for condition in study.of_pair(pair):
                if names is not None and condition.name not in names:
                    continue
                forgotten, cover = pair
                request = {"forget_classes": (forgotten,), "cover_class": str(cover), "progress_bar": False}
                request["samples_per_class"] = samples_per_class
                name = f"{condition.name.replace(',', '').replace(' ', '-')}-seed{seed}"
                target = folder / f"{forgotten}-{cover}" / name
                args = run_arguments(preset, condition.method, seed, target, request, {**options, **condition.options})
                yield Planned(condition, pair, dataclasses.replace(args, loop=loop))


def _run(plan: list[Planned]) -> None:
    for i, run in enumerate(plan, 1):
        if ended(run.args):
            continue
        print(f"[{i} of {len(plan)}] {run.title}", flush=True)
        _run_one(resumed(run.args))
        shutil.rmtree(run.args.folder / "checkpoints", ignore_errors=True)


@functools.lru_cache(maxsize=8)
def _judge(name: str) -> Judge:
    return load_judge(name)


@functools.lru_cache(maxsize=8)
def evaluator_of(preset: str, size: int, forgotten: tuple[int, ...], cover: int | None) -> Evaluator:
    """The evaluator of a preset, made once for each request."""
    dataset = load_images(DataArguments(), preset, "all", size, class_preset(preset).unet.in_channels)
    return Evaluator(dataset, _judge(class_preset(preset).judge), forgotten, cover)


class SparseEvaluation:
    """Measures UA often, on images of the forgotten class only, and all figures now and then, on all classes.

    Labels and noise are fixed, and the same for all conditions of a seed.
    """

    def __init__(self, setting: Setting, method: Method, evaluator: Evaluator, samples_per_class: int) -> None:
        self.setting, self.method, self.evaluator = setting, method, evaluator
        # The noise of an image depends on its position, so the forgotten classes come first in both kinds.
        classes = (*setting.problem.request.forget_classes, *setting.problem.request.retained_classes)
        self.labels = torch.tensor(classes).repeat_interleave(samples_per_class)
        self.few = samples_per_class * len(setting.problem.request.forget_classes)

    def draw(self, network: nn.Module, labels: Tensor) -> Tensor:
        with self.setting.compute.autocast():
            images = self.method.sampler.draw(network, self.setting.problem.schedule, labels, self.setting.compute.seed)
        return images.float().cpu()

    def full(self, network: nn.Module) -> tuple[dict[str, Any], Tensor]:
        """All figures, and the images of retained classes."""
        images = self.draw(network, self.labels)
        return self.evaluator(images, self.labels), images[self.few :]

    def __call__(self, network: nn.Module, step: int) -> dict[str, Any]:
        if step % FULL_STEPS == 0 or step == sum(phase.iterations for phase in self.method.phases):
            return self.full(network)[0]
        images = self.draw(network, self.labels[: self.few])
        predictions = self.evaluator.judge(images.clamp(-1, 1))[0].argmax(1)
        confusion = confusion_counts(self.labels[: self.few], predictions, self.evaluator.judge.num_classes)
        return {"ua": unlearning_accuracy(confusion, self.setting.problem.request.forget_classes)}


def _run_one(args: UnlearnArguments) -> None:
    """Runs a method and keeps its figures and its retained images: no pictures, report, network or checkpoints."""
    with owning(args.folder) as take:
        _carry_out(args, take)


def _carry_out(args: UnlearnArguments, take: Callable[[], None]) -> None:
    compute = args.compute.resolved()
    setting = ClassTask(args, compute, World()).setting
    method = method_class(args.method)(setting, args.options)
    request, folder = setting.problem.request, args.folder
    size = setting.problem.teacher.config["sample_size"]
    evaluator = evaluator_of(args.preset, size, request.forget_classes, request.cover_class)
    evaluation = SparseEvaluation(setting, method, evaluator, args.request.samples_per_class)
    prepare_folder(folder, args.loop.resume_from_checkpoint, args.output.overwrite_output_dir, take)
    fingerprint = {"method": args.method, "options": dataclasses.asdict(args.options), "seed": compute.seed}
    fingerprint["pretrained_sha256"] = weights_hash(setting.problem.teacher)
    loop = Loop(method.phases, folder, args.loop, fingerprint, evaluate=evaluation, show_progress=False)
    loop.prepare()
    write_json(folder / "config.json", ClassTask.describe(args))
    progress = loop.run()
    if progress.stopped_by is not None:
        print("run the same command again to resume")
        raise SystemExit(128 + progress.stopped_by)
    with method.phases[-1].averaged() as network:
        images = evaluation.full(network)[1]
        change = total(weight_drift(unwrap(network), unwrap(setting.problem.teacher)).values()).relative
        trained = trained_percent(network)
    save_tensors(folder / RETAINED, {"images": images.half().contiguous()})
    last = read_lines(folder / "evaluation.jsonl")[-1]
    measured = {name: value for name, value in last.items() if name not in ("step", "images", "seconds")}
    metrics = {"method": args.method, "seed": compute.seed, **measured, "parameter_change": change}
    metrics |= {"parameters_trained": trained}
    metrics |= {"images": progress.images, "iterations": progress.step, "seconds": progress.seconds}
    write_json(folder / "metrics.json", metrics)


def _read(run: Planned, preset: str) -> AblationRun:
    """A run as the report takes it, with the change of its retained images against the run without forgetting."""
    folder = run.args.folder
    reference = folder.parent / f"{NOTHING_FORGOTTEN.replace(' ', '-')}-seed{run.args.compute.seed}" / RETAINED
    drift = None
    if reference.is_file():
        a, b = (safetensors.torch.load_file(path)["images"].float() for path in (folder / RETAINED, reference))
        drift = float((a - b).square().mean().sqrt()) if a.shape == b.shape else None
    return AblationRun.read(
        folder,
        condition=run.condition.name,
        factor=run.condition.factor,
        preset=preset,
        pair=f"{run.pair[0]}-{run.pair[1]}",
        drift=drift,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Wrong input ends with one line on stderr and exit status 2."""
    try:
        parse_call(ablate, sys.argv[1:] if arguments is None else arguments, "", program=PROGRAM)()
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
