"""``pecker-fast unlearn``: makes a pretrained network forget, and reports it."""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data import LabelledImages, load_dataset
from ..diffusion import num_classes
from ..files import read_lines, write_json
from ..hashing import weights_hash
from ..metrics import Judge, load_judge
from ..models import resolve, save_result
from ..parallel import World, world
from ..profiling import Regions
from ..report import save_before_after, save_grid
from ..training.loop import LoopOptions, Progress
from ..training.presets import method_loop, method_options, preset
from ..unlearning import COVER_RANDOM, Compute, ForgetRequest, Method, Problem, Setting, method_class
from .audit import record_result, record_weights
from .evaluation import RunEvaluation, summary
from .options import ComputeArguments, DataArguments, prepare_folder, report_profile
from .running import Running

# Images of each class in the pictures of samples.
PICTURED = 10
INITIAL = ("initial_generator", "initial_score")


@dataclass(frozen=True)
class RequestArguments:
    """What to forget, of which network, and where to put the result."""

    pretrained_model_name_or_path: str | None = None
    """The pretrained network: a folder as diffusers saves it, the folder of a pretraining run, a name on the Hugging
    Face hub, or a checkpoint of the public code of SFD, SalUn or Selective Amnesia (ckpt.pth); the one that comes with
    the preset by default."""
    checkpoint_state: Literal["auto", "ema", "model", "score"] = "auto"
    """Which weights of such a checkpoint: averaged, live, or those of SFD's score network; averaged where there are."""
    initial_generator: str | None = None
    """One-step generator to start from instead of the pretrained network, which stays the teacher: the folder of a run
    (one that has forgotten something before, or was distilled only) or of its unet."""
    initial_score: str | None = None
    """Score network to start from, likewise."""
    output_dir: str | None = None
    """Folder of the run; runs/<preset>-<method>-seed<seed> by default."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that has a run."""
    forget_classes: tuple[int, ...] = (0,)
    """Classes to forget."""
    cover_class: str = "1"
    """The class that is to be drawn in their place, or "random"."""
    forget_data: str | None = None
    """Real images of what is to be forgotten, for saliency_samples=data and for salun, which otherwise takes those of
    the training set: a folder with a subfolder a class."""
    judge: str | None = None
    """File of the classifier for the evaluation; the one that comes with the preset by default."""
    samples_per_class: int = 100
    """Images of each class in an evaluation."""
    evaluate: bool = True
    """Measure the result, where there are a judge and real images."""
    report_to: str = "none"
    """Where the log goes beside train.jsonl: none or tensorboard."""
    progress_bar: bool = True
    """Show a progress bar."""
    dry_run: bool = False
    """Only print the resolved configuration."""


@dataclass(frozen=True)
class UnlearnArguments:
    """All arguments of a run; ``method_class(method).Options`` is the type of ``options``."""

    preset: str
    method: str
    options: Any
    request: RequestArguments = field(default_factory=RequestArguments)
    compute: ComputeArguments = field(default_factory=ComputeArguments)
    data: DataArguments = field(default_factory=DataArguments)
    loop: LoopOptions = field(default_factory=LoopOptions)

    @classmethod
    def defaults(cls, preset_name: str, method: str) -> "UnlearnArguments":
        """The arguments of a method on a preset. ValueError for names that there are not."""
        found = preset(preset_name)
        request = RequestArguments(
            forget_classes=(found.forget_class,),
            cover_class=str(found.cover_class),
            samples_per_class=found.samples_per_class,
        )
        kind = method_class(method)
        options = method_options(preset_name, kind)
        return cls(preset_name, method, options, request=request, loop=method_loop(preset_name, kind))

    @property
    def output_dir(self) -> Path:
        name = f"runs/{self.preset}-{self.method}-seed{self.compute.seed}"
        return Path(self.request.output_dir or name)

    @staticmethod
    def cover_of(given: str) -> int | None:
        """The cover class as a number, None for "random". ValueError for anything else."""
        if given == COVER_RANDOM:
            return None
        if not given.isdecimal():
            raise ValueError(f'cover_class is {given!r}, expected a class or "random"')
        return int(given)

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, as config.json has it."""
        request = dataclasses.asdict(self.request)
        for name in ("dry_run", "overwrite_output_dir", "progress_bar"):
            del request[name]
        request["cover_class"] = self.cover_of(self.request.cover_class)
        request["output_dir"] = str(self.output_dir)
        compute = dataclasses.asdict(self.compute.resolved())
        return {
            "method": self.method,
            "preset": self.preset,
            **request,
            **compute,
            **dataclasses.asdict(self.data),
            **dataclasses.asdict(self.loop),
            "options": dataclasses.asdict(self.options),
        }


def load_evaluation(args: UnlearnArguments, setting: Setting, method: Method) -> RunEvaluation | None:
    """The evaluation of a run, or None where it was not asked for or there is nothing to judge by."""
    found = preset(args.preset)
    if not args.request.evaluate:
        return None
    if args.request.judge is None and found.judge is None:
        print(f"pecker-fast: no evaluation: the preset {args.preset} comes without a judge (--judge)", file=sys.stderr)
        return None
    judge = Judge.load(args.request.judge) if args.request.judge else load_judge(found.judge)
    dataset = load_images(args.data, args.preset, found.reference_split, setting.problem.teacher.config["sample_size"])
    reference = {"dataset": args.data.dataset_name or found.dataset, "split": found.reference_split}
    return RunEvaluation(setting, method, dataset, judge, args.request.samples_per_class, reference)


def load_images(data: DataArguments, preset_name: str, split: str, size: int) -> LabelledImages:
    """The real images of a preset, or those that were asked for, of ``size`` pixels."""
    name = data.dataset_name or preset(preset_name).dataset
    if name in ("cifar10", "stl10") and data.data_root is None:
        raise ValueError(
            f"data_root is not given: expected the folder with the files of {name} (--download puts them there), "
            "or other images by --dataset_name folder:<path>"
        )
    return load_dataset(name, split, data.data_root, data.download, image_size=size)


def load_training_images(args: UnlearnArguments, network: nn.Module, processes: World) -> LabelledImages | None:
    """The images that the network was trained on, or None where the method needs none.

    Raises ValueError for images that are not such as it draws, FileNotFoundError where there are none.
    """
    if not method_class(args.method).needs_data(args.options):
        return None
    config = network.config
    # One process fetches what is not there yet.
    processes.on_main(lambda: load_images(args.data, args.preset, "train", config["sample_size"]))
    images = load_images(args.data, args.preset, "train", config["sample_size"])
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    if tuple(images.image_shape) != shape or images.num_classes != num_classes(network):
        raise ValueError(
            f"the training images have shape {tuple(images.image_shape)} in {images.num_classes} classes, the "
            f"pretrained network draws {shape} in {num_classes(network)}: expected those that it was trained on "
            "(dataset_name, data_root)"
        )
    return images


def load_setting(args: UnlearnArguments, compute: ComputeArguments, processes: World) -> tuple[Setting, str]:
    """What a run's method is given, and where the pretrained network came from. ValueError for wrong arguments."""
    model = resolve(
        args.request.pretrained_model_name_or_path,
        shipped=preset(args.preset).network,
        state=args.request.checkpoint_state,
    )
    network = model.network
    request = ForgetRequest.of(network, args.request.forget_classes, args.cover_of(args.request.cover_class))
    problem = Problem(
        network,
        model.schedule,
        request,
        training_images=load_training_images(args, network, processes),
        **_initial(args),
        **_forget_images(args, request, network.config["sample_size"]),
    )
    regions = Regions(compute.profile, compute.device)
    return Setting(problem, Compute(regions=regions, world=processes, **compute.as_setting())), model.source


def _initial(args: UnlearnArguments) -> dict[str, nn.Module | None]:
    """The networks to start from, None for the pretrained one. ValueError if there is no such network."""
    paths = {name: getattr(args.request, name) for name in INITIAL}
    return {name: None if path is None else resolve(path, name=name).network for name, path in paths.items()}


def _forget_images(args: UnlearnArguments, request: ForgetRequest, size: int) -> dict[str, torch.Tensor]:
    path = args.request.forget_data
    if path is None:
        return {}
    images = load_dataset(f"folder:{path}", "all", image_size=size).of_classes(request.forget_classes)
    if len(images) == 0:
        raise ValueError(f"forget_data {path} has no images of the classes {list(request.forget_classes)}")
    return {"forget_images": images.tensor(), "forget_labels": images.labels}


@dataclass(frozen=True)
class Outcome:
    """What a run came to: what metrics.json holds, and the pretrained network's samples (None without evaluation).

    Under torchrun on the main process; empty on the others."""

    metrics: dict[str, Any]
    before: torch.Tensor | None


def unlearn(args: UnlearnArguments, before: torch.Tensor | None = None) -> Outcome:
    """Runs a method and writes the folder of the run.

    ``before``: the pretrained network's samples from an earlier run on the same network, seed and number of samples,
    which spares drawing them again.

    Raises ValueError or TypeError for wrong arguments, before anything is written; SystemExit 128 + n where signal n
    ended the run, after a checkpoint.
    """
    compute = args.compute.resolved()
    with world(torch.device(compute.device), compute.ddp_timeout) as processes:
        return _unlearn(args, compute, processes, before)


def _unlearn(
    args: UnlearnArguments, compute: ComputeArguments, processes: World, before: torch.Tensor | None
) -> Outcome:
    if torch.cuda.is_initialized():
        # An earlier run of this process is not this run's.
        torch.cuda.reset_peak_memory_stats()
    setting, source = load_setting(args, compute, processes)
    request, regions = setting.problem.request, setting.compute.regions
    teacher_hash = weights_hash(setting.problem.teacher)
    initial = {name: getattr(setting.problem, name) for name in INITIAL}
    method = method_class(args.method)(setting, args.options)
    args.loop.check()
    folder, evaluation = args.output_dir, None

    def begin() -> None:
        nonlocal evaluation
        evaluation = load_evaluation(args, setting, method)
        prepare_folder(folder, args.loop.resume_from_checkpoint, args.request.overwrite_output_dir)

    processes.on_main(begin)
    initial_hashes = {f"{name}_sha256": weights_hash(x) for name, x in initial.items() if x is not None}
    fingerprint = {
        "method": args.method,
        "options": dataclasses.asdict(args.options),
        "pretrained_sha256": teacher_hash,
        **initial_hashes,
        **(
            {} if setting.problem.training_images is None else {"training_images": len(setting.problem.training_images)}
        ),
        "forget_classes": list(request.forget_classes),
        "cover_class": request.cover_class,
        "seed": compute.seed,
        "mixed_precision": compute.mixed_precision,
    }

    def describe() -> None:
        nonlocal before
        said = {**args.describe(), "pretrained_sha256": teacher_hash, **initial_hashes}
        said |= {"training_images": len(setting.problem.training_images or ()), "num_processes": processes.size}
        write_json(folder / "config.json", said)
        if evaluation is not None and before is None:
            before = evaluation.teacher_samples()

    running = Running(
        method,
        folder,
        args.loop,
        compute,
        processes,
        regions,
        args.request.report_to,
        args.request.progress_bar,
        ["unlearn", "--preset", args.preset, "--method", args.method, "--output_dir", str(folder)],
    )
    progress, profiler = running.run(fingerprint, evaluation, describe)
    metrics: dict[str, Any] = {}

    def finish() -> None:
        metrics.update(_finish(args, setting, method, evaluation, before, progress, source))

    # Before the report, which says it too.
    report_profile(profiler, folder, processes)
    processes.on_main(finish)
    return Outcome(metrics, before)


def _finish(
    args: UnlearnArguments,
    setting: Setting,
    method: Method,
    evaluation: RunEvaluation | None,
    before: torch.Tensor | None,
    progress: Progress,
    source: str,
) -> dict[str, Any]:
    folder, phase, problem = args.output_dir, method.phases[-1], setting.problem
    metrics: dict[str, Any] = {"method": args.method, "seed": args.compute.seed, "pretrained": source}
    metrics |= method.sampler.summary()
    with phase.averaged() as averaged:
        save_result(folder, averaged, problem.schedule, method.sampler.t_init)
        moved = record_weights(folder, averaged, problem.initial_generator or problem.teacher, phase.last_mask())
        if evaluation is not None:
            start = time.perf_counter()
            # They end up on the CPU, so that all of the device's work is in the time.
            after = evaluation.samples(averaged)
            metrics["seconds_per_image"] = (time.perf_counter() - start) / len(after)
            records = read_lines(folder / "evaluation.jsonl")
            metrics |= {**summary(records, progress.step), **evaluation.real_split, **evaluation.before(before)}
            _picture(folder, evaluation, before, after)
            metrics["protocol"] = evaluation.protocol()
    metrics |= moved
    record_result(folder, metrics, args.options.ema_decay, progress, setting.compute.device)
    return metrics


def _picture(folder: Path, evaluation: RunEvaluation, before: torch.Tensor, after: torch.Tensor) -> None:
    per_class = len(evaluation.labels) // evaluation.setting.problem.request.num_classes
    shown = (torch.arange(len(evaluation.labels)) % per_class) < PICTURED
    labels, names = evaluation.labels[shown], evaluation.judge.class_names
    marked = evaluation.setting.problem.request.forget_classes
    save_grid(folder / "samples" / "before.png", before[shown], labels, names, highlight=marked)
    save_grid(folder / "samples" / "after.png", after[shown], labels, names, highlight=marked)
    picture = folder / "samples" / "before_after.png"
    save_before_after(picture, before[shown], after[shown], labels, names, highlight=marked)


def run_unlearn(args: UnlearnArguments) -> None:
    """The subcommand: prints the configuration, or runs and prints what came out."""
    if args.request.dry_run:
        args.options.check()
        args.loop.check()
        print(json.dumps(args.describe(), indent=1))
        return
    metrics = unlearn(args).metrics
    if not metrics:
        return
    shown = ("ua", "retain_accuracy", "frechet_distance", "diversity", "seconds")
    print("  ".join(f"{name} {metrics[name]:.4g}" for name in shown if metrics.get(name) is not None))
    print(f"report: {args.output_dir / 'report.md'}")
