"""Pretraining of the class-conditional network that unlearning starts from."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..data import LabelledImages, folder_of, survey_folder
from ..diffusion import (
    NUM_TRAIN_TIMESTEPS,
    NoiseSchedule,
    UNetConfig,
    build_unet,
    pretrained_sampler,
    register_classes,
    register_sampling,
)
from ..files import write_json
from ..metrics import Evaluator, Judge
from ..models import save_network
from ..parallel import world
from ..report import save_grid
from ..training.loop import LoopOptions, Progress
from ..training.pretrain import Pretraining, PretrainOptions
from ..unlearning.streams import derived_seed
from .arguments import ComputeArguments, DataArguments, OutputArguments, option_words
from .classes.data import (
    check_counts,
    check_images,
    check_judge,
    dataset_of,
    find_judge,
    lacks_files,
    load_images,
    shape_of,
)
from .classes.measure import real_split
from .classes.task import PICTURED
from .distilled import SaveArguments, rounded
from .folder import check_folder, owning, prepare_folder
from .presets import class_preset
from .presets.images import unet_for
from .recorded import usual_folder
from .running import Running

# What the network is called in messages about images that do not fit it.
NETWORK = "the U-Net (sample_size, in_channels, num_classes)"


@dataclass(frozen=True)
class PretrainEvaluation:
    """How the samples are measured."""

    samples_per_class: int = 100
    """Images of each class in an evaluation."""
    judge: str | None = None
    """File of the classifier that measures samples, and later those of runs on this network. Default: the preset's."""
    evaluate: bool = True
    """Measure samples, if there is a judge."""
    eval_guidance_scale: float = 1.0
    """Guidance of the samples, 1 is none; other scales need a network with a label for "no condition". The network's
    configuration has it too, and whoever compares a result with this network draws with it."""
    num_inference_steps: int = 50
    """Steps of DDIM of the samples. The network's configuration has them too."""


@dataclass(frozen=True)
class PretrainArguments:
    """All options of a pretraining run; ``PretrainArguments.defaults`` makes them for a preset."""

    preset: str
    """Name of a preset."""
    options: PretrainOptions
    unet: UNetConfig
    evaluation: PretrainEvaluation = field(default_factory=PretrainEvaluation)
    compute: ComputeArguments = field(default_factory=ComputeArguments)
    data: DataArguments = field(default_factory=DataArguments)
    loop: LoopOptions = field(default_factory=LoopOptions)
    output: OutputArguments = field(default_factory=OutputArguments)
    save: SaveArguments = field(default_factory=SaveArguments)

    @classmethod
    def defaults(
        cls,
        preset_name: str,
        dataset_name: str | None = None,
        sample_size: int | None = None,
        in_channels: int | None = None,
        own_levels: bool = False,
    ) -> "PretrainArguments":
        """The options of a preset. The network has the classes of a folder of pictures; of the preset images also their
        size and channels.

        Parameters
        ----------
        preset_name : str
            Name of the preset.
        dataset_name : str, optional
            The data set.
        sample_size, in_channels : int, optional
            What is set by the user in place of the preset's or the data's.
        own_levels : bool
            Whether the user sets the levels of the network, so that it needs not be one that the preset has.

        Raises
        ------
        ValueError, FileNotFoundError
            If there is no such preset, or the pictures of the folder do not fit the preset's network.
        """
        values = class_preset(preset_name)
        unet, folder = values.unet, folder_of(dataset_name)
        if folder is None or not Path(folder).is_dir():
            # A run says that it is missing; the options can be shown nevertheless.
            pass
        elif values.dataset is not None:
            unet = dataclasses.replace(unet, num_classes=len(survey_folder(folder).class_names))
        else:
            size, channels, names = shape_of(dataset_name, sample_size, in_channels)
            if own_levels:
                shape = {"sample_size": size, "in_channels": channels, "num_classes": len(names)}
                unet = dataclasses.replace(unet, **shape, block_out_channels=unet.block_out_channels[:1])
            else:
                unet = unet_for(size, channels, len(names))
        evaluation = PretrainEvaluation(
            eval_guidance_scale=values.guidance_scale, num_inference_steps=values.num_inference_steps
        )
        return cls(preset_name, values.pretrain, unet, evaluation, loop=values.pretrain_loop)

    def resolved(self) -> ComputeArguments:
        """How the run computes. ValueError as by ``ComputeArguments.resolved``."""
        return self.compute.resolved(cpu_bf16=class_preset(self.preset).pretrain_in_bf16)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output.output_dir or usual_folder(self.preset, "pretrain", self.compute.seed))

    def check(self) -> None:
        """Check the options of training, loop and output. ValueError or TypeError if one is wrong."""
        dataset_of(self.data, self.preset)
        self.options.check()
        check_number("eval_guidance_scale", self.evaluation.eval_guidance_scale)
        if self.evaluation.eval_guidance_scale != 1 and not self.unet.null_label:
            raise ValueError(
                f'eval_guidance_scale is {self.evaluation.eval_guidance_scale:g}, but the network has no label for "no '
                'condition": expected 1, or null_label'
            )
        check_int("num_inference_steps", self.evaluation.num_inference_steps, 1, NUM_TRAIN_TIMESTEPS + 1)
        self.loop.check()
        self.output.check()

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, for config.json."""
        return {
            "method": "pretrain",
            "preset": self.preset,
            **dataclasses.asdict(self.evaluation),
            **dataclasses.asdict(self.save),
            "output_dir": str(self.folder),
            **self.output.describe(),
            **dataclasses.asdict(self.resolved()),
            **dataclasses.asdict(self.data),
            **dataclasses.asdict(self.loop),
            "options": dataclasses.asdict(self.options),
            "unet": dataclasses.asdict(self.unet),
        }

    def rehearse(self) -> list[str]:
        """Check all that a run checks before it trains, and write nothing; returns what could not be checked."""
        lack = lacks_files(self.data, self.preset)
        if class_preset(self.preset).dataset is not None or self.data.dataset_name is not None:
            self.check()
        check_folder(self.folder, self.loop.resume_from_checkpoint, self.output.overwrite_output_dir)
        self.resolved()
        judge = find_judge(self.preset, self.evaluation.judge) if self.evaluation.evaluate else None
        if lack is not None:
            return [lack]
        name, size, channels = dataset_of(self.data, self.preset), self.unet.sample_size, self.unet.in_channels
        images = load_images(self.data, self.preset, "train", size, channels)
        check_counts(images, name, 1, "to train on")
        check_images(images, name, build_unet(self.unet), NETWORK)
        if judge is not None:
            self.reference(judge)
        return []

    def reference(self, judge: Judge) -> LabelledImages:
        """Load the real images that samples are compared with.

        ValueError if they do not fit the judge, or a class has fewer than two.
        """
        name = dataset_of(self.data, self.preset)
        images = load_images(self.data, self.preset, "all", self.unet.sample_size, self.unet.in_channels)
        check_judge(judge, self.evaluation.judge, images, name)
        check_counts(images, name, 2, "to measure samples with")
        return images


def pretrain(args: PretrainArguments) -> dict[str, Any]:
    """Train a network from scratch and write the folder of the run, with the network in ``unet``.

    Parameters
    ----------
    args : PretrainArguments
        All options.

    Returns
    -------
    dict
        What metrics.json holds; under torchrun empty on all processes but the main one.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, before anything is written.
    FileNotFoundError
        If the images are missing.
    SystemExit
        With status 128 + n if signal n stopped the run, after a checkpoint.
    """
    resolved, folder = args.resolved(), args.folder
    args.check()
    with world(torch.device(resolved.device), resolved.ddp_timeout) as processes, owning(folder) as take:
        processes.on_main(take)
        name, size, channels = dataset_of(args.data, args.preset), args.unet.sample_size, args.unet.in_channels
        # One process downloads what is missing.
        processes.on_main(lambda: load_images(args.data, args.preset, "train", size, channels))
        dataset = load_images(args.data, args.preset, "train", size, channels)
        check_counts(dataset, name, 1, "to train on")
        compute = resolved.as_compute(processes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(compute.seed, "weights"))
            network = build_unet(args.unet)
        check_images(dataset, name, network, NETWORK)
        register_classes(network, args.unet.num_classes, dataset.class_names)
        register_sampling(network, args.evaluation.eval_guidance_scale, args.evaluation.num_inference_steps)
        schedule = NoiseSchedule.linear()
        phase = Pretraining(compute, network, schedule, dataset, args.options)
        evaluator: Evaluator | None = None
        labels = torch.arange(args.unet.num_classes).repeat_interleave(args.evaluation.samples_per_class)

        def prepare() -> None:
            nonlocal evaluator
            judge = find_judge(args.preset, args.evaluation.judge) if args.evaluation.evaluate else None
            if judge is not None:
                evaluator = Evaluator(args.reference(judge), judge, ())
            prepare_folder(folder, args.loop.resume_from_checkpoint, args.output.overwrite_output_dir, take)

        processes.on_main(prepare)

        def draw(averaged: nn.Module) -> Tensor:
            with compute.autocast():
                sampler = pretrained_sampler(phase.schedule, averaged)
                return sampler.draw(averaged, phase.schedule, labels, compute.seed).cpu()

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

        def begin() -> None:
            write_json(folder / "config.json", {**args.describe(), "num_processes": processes.size})

        words = ["pretrain", "--preset", args.preset, *option_words(args, args.defaults(args.preset))]
        running = Running([phase], folder, args.loop, resolved, args.output, processes, compute.regions, words)
        progress = running.train(
            fingerprint, begin=begin, evaluate=None if evaluator is None else evaluate, export=export
        )
        metrics: dict[str, Any] = {}

        def finish(progress: Progress) -> None:
            # What is measured is what the file holds.
            with phase.averaged() as averaged:
                saved = rounded(averaged, args.save.dtype)
                export(saved, folder)
                images = draw(rounded(saved, torch.float32))
            metrics.update(method="pretrain", seed=compute.seed)
            metrics.update(_measure(images, labels, evaluator, folder, dataset))
            metrics.update(images=progress.images, iterations=progress.step, seconds=progress.seconds)
            write_json(folder / "metrics.json", metrics)

        processes.on_main(lambda: finish(progress))
        return metrics


def _measure(
    images: Tensor, labels: Tensor, evaluator: Evaluator | None, folder: Path, dataset: LabelledImages
) -> dict[str, Any]:
    """Draw the picture of the samples, and measure them if there is a judge."""
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
