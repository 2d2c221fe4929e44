"""``pecker-fast ablate``: what the mask and the other parts of the method do, on digits, over seeds."""

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..diffusion.networks import unwrap
from ..files import read_lines, save_tensors, write_json
from ..hashing import weights_hash
from ..metrics import Evaluator, Judge, load_judge
from ..metrics.drift import total, trained_percent, weight_drift
from ..parallel import World, started_by_torchrun
from ..report import AblationRun, read_ablation, write_ablation
from ..training.loop import Loop, LoopOptions
from ..training.presets import preset as preset_called
from ..unlearning import Method, Setting, method_class
from .options import prepare_folder
from .several import assignment, check_given, command_line, ended, going_on, run_arguments
from .studies import NOTHING_FORGOTTEN, STUDIES, Condition, Study
from .unlearn import UnlearnArguments, load_images, load_setting

# Between full evaluations the forgotten class alone is drawn and judged.
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

    The same command again goes on where it was interrupted; runs that have ended are read, not repeated, and the
    studies share those that they have in common. Conditions of a seed run one after the other before the next seed's,
    so that whatever there is can be compared. Several processes can share the work: --worker 1/2 and --worker 2/2.

    Args:
        study: mask (what the mask does) or plus (what PECKER+'s changes do).
        preset: digits or digits16, or another preset with a judge.
        seeds: How many seeds each condition is run on.
        first_seed: The first of them.
        pairs: Forgotten class and cover class, as 0-1; the study's by default.
        conditions: Names of conditions to run, of the study's; all by default.
        output_dir: Folder of the study; runs/ablation-<preset> by default.
        max_train_steps: Iterations of each run; the learning rates fall over them.
        samples_per_class: Images of each class in an evaluation.
        worker: I/N: every N-th run, from the I-th.
        report_only: Only report the runs that have ended.
        runs: Report the runs of this file instead, runs.jsonl of an earlier report; nothing is run.
        set: Options for all methods that have them, as name=value, such as train_batch_size=24.
    """
    if started_by_torchrun():
        raise ValueError("ablate runs in one process: --worker I/N shares its runs between several")
    if study not in STUDIES:
        raise ValueError(f"study is {study!r}, expected one of {', '.join(STUDIES)}")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected at least 1")
    found = STUDIES[study]
    place, workers = _worker(worker)
    folder = Path(output_dir or f"runs/ablation-{preset}")
    given = {**dict(assignment(item) for item in set), "max_train_steps": max_train_steps}
    asked = found.pairs if pairs is None else tuple(_pair(text) for text in pairs)
    several = range(first_seed, first_seed + seeds)
    plan = list(_plan(found, preset, several, asked, conditions, folder, given, samples_per_class))
    if not plan:
        raise ValueError(f"conditions {', '.join(conditions)} are of the pair {found.pairs[0]} alone")
    # What a method of the study has, whichever of its conditions are asked for.
    check_given(given, [run.args for run in _plan(found, preset, range(1), found.pairs[:1], None, folder, given, 1)])
    for run in plan:
        run.args.options.check()
        ended(run.args)
    if runs is not None:
        _report(found, study, folder, list(_from_file(Path(runs), found, preset, asked)))
        return
    if not report_only:
        _run([run for i, run in enumerate(plan) if i % workers == place])
    missing = [run for run in plan if not ended(run.args)]
    there = [run for run in plan if ended(run.args)]
    if missing and not report_only:
        print(f"{len(missing)} of {len(plan)} runs are left to other workers; who ends last writes the report")
        return
    if not there:
        raise ValueError(f"{folder} has no run of this study that has ended")
    if missing:
        print(f"{len(missing)} of {len(plan)} runs are missing")
    _report(found, study, folder, [_read(run, preset) for run in there])


def _from_file(path: Path, study: Study, preset: str, pairs: tuple[tuple[int, int], ...]) -> Iterator[AblationRun]:
    """The runs of a study in a file that may have others too, in the order of the study's tables."""
    there = [run for run in read_ablation(path) if run.preset == preset]
    for pair in pairs:
        for condition in study.of_pair(pair):
            for run in there:
                if (run.pair, run.condition) == (f"{pair[0]}-{pair[1]}", condition.name):
                    yield dataclasses.replace(run, factor=condition.factor)


def _report(study: Study, name: str, folder: Path, runs: list[AblationRun]) -> None:
    report = write_ablation(
        folder / name,
        runs,
        asked=study.asked,
        command=command_line("ablate", "--study", name),
        default=study.default,
        frontier=study.frontier,
        reference=NOTHING_FORGOTTEN,
    )
    print(f"report: {report}")


def _worker(text: str) -> tuple[int, int]:
    """Place, from 0, and number of workers. ValueError for anything else than I/N with 1 <= I <= N."""
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
    given: dict[str, Any],
    samples_per_class: int,
) -> Iterator[Planned]:
    """All runs, seed by seed. ValueError for names that the study has not, and a preset without a judge."""
    known = [condition.name for condition in study.of_pair(study.pairs[0])]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"conditions has {unknown[0]!r}, expected some of {', '.join(known)}")
    if preset_called(preset).judge is None:
        raise ValueError(f"preset is {preset!r}, which comes without a judge; expected digits or digits16")
    loop = LoopOptions(logging_steps=10, checkpointing_steps=10**6, checkpoints_total_limit=1)
    loop = dataclasses.replace(loop, validation_steps=UA_STEPS)
    for seed in seeds:
        for pair in pairs:
            for condition in study.of_pair(pair):
                if names is not None and condition.name not in names:
                    continue
                forgotten, cover = pair
                request = {"forget_classes": (forgotten,), "cover_class": str(cover)}
                request["samples_per_class"] = samples_per_class
                name = f"{condition.name.replace(',', '').replace(' ', '-')}-seed{seed}"
                target = folder / f"{forgotten}-{cover}" / name
                args = run_arguments(
                    preset, condition.method, seed, target, request, {**given, **condition.options}, False
                )
                yield Planned(condition, pair, dataclasses.replace(args, loop=loop))


def _run(plan: list[Planned]) -> None:
    for i, run in enumerate(plan, 1):
        if ended(run.args):
            continue
        print(f"[{i} of {len(plan)}] {run.title}", flush=True)
        _run_one(going_on(run.args))
        shutil.rmtree(run.args.output_dir / "checkpoints", ignore_errors=True)


@functools.lru_cache(maxsize=8)
def _judge(name: str) -> Judge:
    return load_judge(name)


@functools.lru_cache(maxsize=8)
def _evaluator(preset: str, size: int, forgotten: tuple[int, ...], cover: int | None) -> Evaluator:
    dataset = load_images(UnlearnArguments.defaults(preset, "sfd").data, preset, "all", size)
    return Evaluator(dataset, _judge(preset_called(preset).judge), forgotten, cover)


class SparseEvaluation:
    """Often draws what is asked for the forgotten class, for UA alone; now and then all classes, for everything.

    Fixed labels and noise, the same for all conditions of a seed.
    """

    def __init__(self, setting: Setting, method: Method, evaluator: Evaluator, samples_per_class: int) -> None:
        self.setting, self.method, self.evaluator = setting, method, evaluator
        # The noise of an image depends on its place: the forgotten classes come first, the others after them.
        classes = (*setting.problem.request.forget_classes, *setting.problem.request.retained_classes)
        self.labels = torch.tensor(classes).repeat_interleave(samples_per_class)
        self.few = samples_per_class * len(setting.problem.request.forget_classes)

    def draw(self, network: nn.Module, labels: Tensor) -> Tensor:
        return self.method.sample(network, labels, seed=self.setting.compute.seed).float().cpu()

    def full(self, network: nn.Module) -> tuple[dict[str, Any], Tensor]:
        """All figures, and the images of retained classes."""
        images = self.draw(network, self.labels)
        return self.evaluator(images, self.labels), images[self.few :]

    def __call__(self, network: nn.Module, step: int) -> dict[str, Any]:
        if step % FULL_STEPS == 0 or step == sum(phase.iterations for phase in self.method.phases):
            return self.full(network)[0]
        images = self.draw(network, self.labels[: self.few])
        predictions = self.evaluator.judge(images.clamp(-1, 1))[0].argmax(1)
        still = torch.isin(predictions, torch.tensor(self.setting.problem.request.forget_classes))
        return {"ua": 100 - 100 * int(still.sum()) / len(still)}


def _run_one(args: UnlearnArguments) -> None:
    """A run without pictures, report, network or checkpoints left: what was measured, and the retained images."""
    compute = args.compute.resolved()
    setting, _ = load_setting(args, compute, World())
    method = method_class(args.method)(setting, args.options)
    request, folder = setting.problem.request, args.output_dir
    size = setting.problem.teacher.config["sample_size"]
    evaluator = _evaluator(args.preset, size, request.forget_classes, request.cover_class)
    evaluation = SparseEvaluation(setting, method, evaluator, args.request.samples_per_class)
    prepare_folder(folder, args.loop.resume_from_checkpoint, args.request.overwrite_output_dir)
    fingerprint = {"method": args.method, "options": dataclasses.asdict(args.options), "seed": compute.seed}
    fingerprint["pretrained_sha256"] = weights_hash(setting.problem.teacher)
    loop = Loop(method.phases, folder, args.loop, fingerprint, evaluate=evaluation, show_progress=False)
    loop.prepare()
    write_json(folder / "config.json", args.describe())
    progress = loop.run()
    if progress.stopped_by is not None:
        print("the same command again goes on here")
        raise SystemExit(128 + progress.stopped_by)
    with method.phases[-1].averaged() as network:
        images = evaluation.full(network)[1]
        moved = total(weight_drift(unwrap(network), unwrap(setting.problem.teacher)).values()).relative
        trained = trained_percent(network)
    save_tensors(folder / RETAINED, {"images": images.half().contiguous()})
    last = read_lines(folder / "evaluation.jsonl")[-1]
    measured = {name: value for name, value in last.items() if name not in ("step", "images", "seconds")}
    metrics = {"method": args.method, "seed": compute.seed, **measured, "parameter_change": moved}
    metrics |= {"parameters_trained": trained}
    metrics |= {"images": progress.images, "iterations": progress.step, "seconds": progress.seconds}
    write_json(folder / "metrics.json", metrics)


def _read(run: Planned, preset: str) -> AblationRun:
    """A run as the report takes it, with the change of retained images against the seed's run without forgetting."""
    folder = run.args.output_dir
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
