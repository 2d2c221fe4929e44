"""``pecker-fast pretrain``: trains the class-conditional network that unlearning starts from."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import LabelledImages
from ..diffusion import NoiseSchedule, UNetConfig, build_unet
from ..files import write_json
from ..metrics import Evaluator, load_judge
from ..models import save_network
from ..parallel import World, world
from ..profiling import Regions
from ..report import save_grid
from ..training.loop import Loop, LoopOptions
from ..training.presets import preset
from ..training.pretrain import Pretraining, PretrainOptions
from ..training.tracking import tracker
from ..unlearning import Compute
from ..unlearning.streams import derived_seed
from .evaluation import TEACHER_SAMPLER, real_split
from .options import ComputeArguments, DataArguments, prepare_folder, profiler_of, report_profile
from .running import say_how_to_resume
from .unlearn import PICTURED, load_images


@dataclass(frozen=True)
class PretrainRequest:
    """Where to put the result."""

    output_dir: str | None = None
    """Folder of the run; runs/<preset>-pretrain-seed<seed> by default."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that has a run."""
    samples_per_class: int = 100
    """Images of each class in an evaluation."""
    evaluate: bool = True
    """Measure samples, where the preset comes with a judge."""
    report_to: str = "none"
    """Where the log goes beside train.jsonl: none or tensorboard."""
    progress_bar: bool = True
    """Show a progress bar."""
    dry_run: bool = False
    """Only print the resolved configuration."""


@dataclass(frozen=True)
class PretrainArguments:
    """All arguments of a pretraining run."""

    preset: str
    options: PretrainOptions
    unet: UNetConfig
    request: PretrainRequest = field(default_factory=PretrainRequest)
    compute: ComputeArguments = field(default_factory=ComputeArguments)
    data: DataArguments = field(default_factory=DataArguments)
    loop: LoopOptions = field(default_factory=LoopOptions)

    @classmethod
    def defaults(cls, preset_name: str) -> "PretrainArguments":
        """The arguments of a preset. ValueError for a name that there is not."""
        found = preset(preset_name)
        return cls(preset_name, found.pretrain, found.unet, loop=found.pretrain_loop)

    @property
    def output_dir(self) -> Path:
        return Path(self.request.output_dir or f"runs/{self.preset}-pretrain-seed{self.compute.seed}")

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, as config.json has it."""
        request = dataclasses.asdict(self.request)
        for name in ("dry_run", "overwrite_output_dir", "progress_bar"):
            del request[name]
        return {
            "method": "pretrain",
            "preset": self.preset,
            **request,
            "output_dir": str(self.output_dir),
            **dataclasses.asdict(self.compute.resolved()),
            **dataclasses.asdict(self.data),
            **dataclasses.asdict(self.loop),
            "options": dataclasses.asdict(self.options),
            "unet": dataclasses.asdict(self.unet),
        }


def pretrain(args: PretrainArguments) -> dict[str, Any]:
    """Runs pretraining and writes the folder of the run, its network in ``unet``; returns what metrics.json holds
    (under torchrun on the main process; nothing on the others).

    Raises ValueError or TypeError for wrong arguments, FileNotFoundError for missing data, before anything is written;
    SystemExit 128 + n where signal n ended the run, after a checkpoint.
    """
    compute_args = args.compute.resolved()
    args.options.check()
    with world(torch.device(compute_args.device), compute_args.ddp_timeout) as processes:
        return _pretrain(args, compute_args, processes)


def _pretrain(args: PretrainArguments, compute_args: ComputeArguments, processes: World) -> dict[str, Any]:
    # One process fetches what is not there yet.
    processes.on_main(lambda: load_images(args.data, args.preset, "train", args.unet.sample_size))
    dataset = load_images(args.data, args.preset, "train", args.unet.sample_size)
    shape = (args.unet.in_channels, args.unet.sample_size, args.unet.sample_size)
    if tuple(dataset.image_shape) != shape or dataset.num_classes != args.unet.num_classes:
        raise ValueError(
            f"dataset_name has images of shape {tuple(dataset.image_shape)} in {dataset.num_classes} classes, "
            f"the U-Net is for {shape} in {args.unet.num_classes}: set in_channels, sample_size and num_classes"
        )
    regions = Regions(compute_args.profile, compute_args.device)
    compute = Compute(regions=regions, world=processes, **compute_args.as_setting())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(compute.seed, "weights"))
        network = build_unet(args.unet)
    schedule = NoiseSchedule.linear()
    phase = Pretraining(compute, network, schedule, dataset, args.options)
    folder = args.output_dir
    args.loop.check()
    evaluator = None
    labels = torch.arange(args.unet.num_classes).repeat_interleave(args.request.samples_per_class)

    def begin() -> None:
        nonlocal evaluator
        prepare_folder(folder, args.loop.resume_from_checkpoint, args.request.overwrite_output_dir)
        judge_name = preset(args.preset).judge
        if args.request.evaluate and judge_name is not None:
            real = load_images(args.data, args.preset, "all", args.unet.sample_size)
            evaluator = Evaluator(real, load_judge(judge_name), ())

    processes.on_main(begin)

    def draw(averaged: nn.Module) -> torch.Tensor:
        with compute.autocast():
            return TEACHER_SAMPLER.draw(averaged, phase.schedule, labels, compute.seed).cpu()

    def evaluate(averaged: nn.Module, step: int) -> dict[str, Any]:
        measured = evaluator(draw(averaged), labels)
        names = ("retain_accuracy", "frechet_distance", "diversity", "feature_extractor")
        return {name: measured[name] for name in names}

    def export(averaged: nn.Module, target: Path) -> None:
        save_network(target / "unet", averaged, schedule)

    fingerprint = {
        "method": "pretrain",
        "options": dataclasses.asdict(args.options),
        "unet": dataclasses.asdict(args.unet),
        "images": len(dataset),
        "seed": compute.seed,
        "mixed_precision": compute.mixed_precision,
    }
    profiler = profiler_of(compute_args, regions, folder, processes)
    with tracker(args.request.report_to if processes.is_main else "none", folder) as on_log:
        loop = Loop(
            [phase],
            folder,
            args.loop,
            fingerprint,
            stop_at_nonfinite=compute_args.nonfinite == "stop",
            evaluate=None if evaluator is None else evaluate,
            export=export,
            on_log=on_log,
            show_progress=args.request.progress_bar,
            world=processes,
            profiler=profiler,
        )
        loop.prepare()
        said = {**args.describe(), "num_processes": processes.size}
        processes.on_main(lambda: write_json(folder / "config.json", said))
        progress = loop.run()
    if progress.stopped_by is not None:
        if processes.is_main:
            say_how_to_resume(progress, ["pretrain", "--preset", args.preset])
        raise SystemExit(128 + progress.stopped_by)
    metrics: dict[str, Any] = {}

    def finish() -> None:
        with phase.averaged() as averaged:
            export(averaged, folder)
            images = draw(averaged)
        metrics.update(method="pretrain", seed=compute.seed, **_measure(images, labels, evaluator, folder, dataset))
        metrics.update(images=progress.images, iterations=progress.step, seconds=progress.seconds)
        write_json(folder / "metrics.json", metrics)

    processes.on_main(finish)
    report_profile(profiler, folder, processes)
    return metrics


def _measure(
    images: torch.Tensor, labels: torch.Tensor, evaluator: Evaluator | None, folder: Path, dataset: LabelledImages
) -> dict[str, Any]:
    """Pictures samples, and says how good they are where there is a judge."""
    per_class = int((labels == 0).sum())
    shown = (torch.arange(len(labels)) % per_class) < PICTURED
    save_grid(folder / "samples" / "samples.png", images[shown], labels[shown], dataset.class_names)
    if evaluator is None:
        return {}
    measured = evaluator(images, labels)
    right = evaluator.judge(images)[0].argmax(1) == labels
    return {
        "accuracy": measured["retain_accuracy"],
        "worst_class_accuracy": 100 * min(right[labels == c].double().mean().item() for c in labels.unique()),
        "frechet_distance": measured["frechet_distance"],
        "frechet_real_split": real_split(evaluator, len(labels)),
        "frechet_real_split_stratified": real_split(evaluator, len(labels), stratified=True),
        "diversity": measured["diversity"],
        "feature_extractor": measured["feature_extractor"],
    }


def run_pretrain(args: PretrainArguments) -> None:
    """The subcommand: prints the configuration, or runs and prints what came out."""
    if args.request.dry_run:
        args.options.check()
        args.loop.check()
        print(json.dumps(args.describe(), indent=1))
        return
    metrics = pretrain(args)
    if not metrics:
        return
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, float)))
    print(f"network: {args.output_dir / 'unet'}")
