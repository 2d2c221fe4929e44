"""``pecker-fast unlearn`` on a text-to-image model: makes a Stable Diffusion forget a concept."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffusion import NoiseSchedule
from ..files import write_json
from ..hashing import file_sha256, weights_hash
from ..mask import SaliencyMask
from ..models import StableDiffusion, resolve_text, resolve_text_unet, save_text_pipeline
from ..parallel import World, process_count, process_number, world
from ..profiling import Regions
from ..training.loop import LoopOptions, Progress
from ..training.memory import SD15, MemoryEstimate, describe_memory, estimate_memory
from ..training.presets import method_loop, method_options, method_values
from ..training.text_presets import text_preset
from ..unlearning import Compute, Method, Problem, Setting, method_class
from ..unlearning.options import ScoreForgettingOptions
from ..unlearning.selective_amnesia import SelectiveAmnesiaOptions
from .audit import record_result, record_weights
from .fisher_file import load_fisher
from .options import ComputeArguments, prepare_folder, report_profile
from .running import Running
from .text_card import write_text_card
from .text_models import TextPictures, encoded, on_network
from .text_request import MemoryArguments, Prompts, TextRequestArguments, resolve_prompts

# How a run is computed, and not which one it is.
HOW = ("gradient_checkpointing", "fsdp")


@dataclass(frozen=True)
class UnlearnTextArguments:
    """All arguments of a run; ``method_class(method).Options`` is the type of ``options``."""

    preset: str
    method: str
    options: Any
    request: TextRequestArguments = field(default_factory=TextRequestArguments)
    memory: MemoryArguments = field(default_factory=MemoryArguments)
    compute: ComputeArguments = field(default_factory=ComputeArguments)
    loop: LoopOptions = field(default_factory=LoopOptions)

    @classmethod
    def defaults(cls, preset_name: str, method: str) -> "UnlearnTextArguments":
        """The arguments of a method on a preset. ValueError for names that there are not."""
        text_preset(preset_name)
        kind = method_class(method)
        return cls(
            preset_name,
            method,
            method_options(preset_name, kind),
            memory=MemoryArguments(**method_values(preset_name, kind, MemoryArguments)),
            loop=method_loop(preset_name, kind),
        )

    @property
    def output_dir(self) -> Path:
        return Path(self.request.output_dir or f"runs/{self.preset}-{self.method}-seed{self.compute.seed}")

    def prompts(self) -> Prompts:
        """The prompts of the run. ValueError where they cannot be had."""
        return resolve_prompts(self.request, text_preset(self.preset), self.compute.seed)

    def describe(self) -> dict[str, Any]:
        """The configuration as JSON, as config.json has it."""
        request = dataclasses.asdict(self.request)
        for name in ("dry_run", "overwrite_output_dir", "progress_bar"):
            del request[name]
        found = self.prompts()
        return {
            "method": self.method,
            "preset": self.preset,
            "task": text_preset(self.preset).task,
            **request,
            "concept": found.concept,
            "cover": found.cover,
            "output_dir": str(self.output_dir),
            **dataclasses.asdict(self.memory),
            **dataclasses.asdict(self.compute.resolved()),
            **dataclasses.asdict(self.loop),
            "prompts": {
                "retain": len(found.request.retain),
                "forget": list(found.request.forget),
                "cover": list(found.request.cover),
                "negative": found.request.negative,
                "pictured": list(found.pictured),
            },
            "options": dataclasses.asdict(self.options),
        }


def unlearn_text(args: UnlearnTextArguments) -> dict[str, Any]:
    """Runs a method and writes the folder of the run; returns what metrics.json holds (under torchrun on the main
    process; nothing on the others).

    Raises ValueError or TypeError for wrong arguments, before anything is written; SystemExit 128 + n where signal n
    ended the run, after a checkpoint.
    """
    if isinstance(args.options, SelectiveAmnesiaOptions) and args.request.fisher is None:
        raise ValueError("fisher is not given: expected the file that pecker-fast fisher makes of the same model")
    compute = args.compute.resolved()
    with world(torch.device(compute.device), compute.ddp_timeout) as processes:
        return _unlearn(args, compute, processes)


@dataclass(frozen=True)
class Loaded:
    """What a run on a text-to-image model begins with, its folder made.

    Parameters
    ----------
    model, source: the Stable Diffusion, and where it came from.
    prompts: of the run.
    setting: what the method is given.
    fingerprint: which run it is, as JSON. hashes: the part of it that says which weights were read.
    """

    model: StableDiffusion
    source: str
    prompts: Prompts
    setting: Setting
    fingerprint: dict[str, Any]
    hashes: dict[str, str]


def load_text_setting(args: UnlearnTextArguments, compute: ComputeArguments, processes: World) -> Loaded:
    """Reads the model and encodes the prompts; ``compute`` resolved.

    Raises ValueError or TypeError for wrong arguments, before anything is written.
    """
    if torch.cuda.is_initialized():
        # An earlier run of this process is not this run's.
        torch.cuda.reset_peak_memory_stats()
    prompts = args.prompts()
    args.loop.check()
    check_placement(args, processes.size)
    resolved = resolve_text(args.request.pretrained_model_name_or_path)
    model = resolved.parts
    args.options.check(model.schedule.num_train_timesteps)
    unet = resolved.load_unet()
    paths = {name: getattr(args.request, name) for name in ("initial_generator", "initial_score")}
    initial = {name: None if path is None else resolve_text_unet(path, name=name) for name, path in paths.items()}
    hashes = {"pretrained_sha256": weights_hash(unet)}
    hashes |= {f"{name}_sha256": weights_hash(found) for name, found in initial.items() if found is not None}
    fisher = _fisher(args, unet, hashes)
    folder = args.output_dir
    processes.on_main(
        lambda: prepare_folder(folder, args.loop.resume_from_checkpoint, args.request.overwrite_output_dir)
    )
    embeddings = _embeddings(args, compute, processes, model, prompts)
    network = model.network(embeddings, args.request.resolution, unet)
    problem = Problem(
        network,
        model.schedule,
        prompts.request,
        fisher=fisher,
        **{name: on_network(model, found, network) for name, found in initial.items()},
    )
    regions = Regions(compute.profile, compute.device)
    how = Compute(regions=regions, world=processes, **compute.as_setting())
    setting = Setting(problem, how, args.memory.placement())
    return Loaded(model, resolved.source, prompts, setting, _fingerprint(args, compute, prompts, hashes), hashes)


def check_placement(args: UnlearnTextArguments, processes: int) -> None:
    """ValueError if the method does not support the placement."""
    kind, placement = method_class(args.method), args.memory.placement()
    placement.check_method(kind, args.options, processes=processes, compile=args.compute.torch_compile)


def _fisher(args: UnlearnTextArguments, unet: nn.Module, hashes: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """The Fisher information that was given, whose hash is added to ``hashes``; None where there is none."""
    path = args.request.fisher
    if path is None:
        return None
    if not isinstance(args.options, SelectiveAmnesiaOptions):
        raise ValueError(f"fisher is {path!r}, but {args.method} takes none: it is for --method selective_amnesia")
    found = load_fisher(path, unet, hashes["pretrained_sha256"], args.options.loss_reduction)
    hashes["fisher_sha256"] = file_sha256(Path(path))
    return found


def _unlearn(args: UnlearnTextArguments, compute: ComputeArguments, processes: World) -> dict[str, Any]:
    loaded = load_text_setting(args, compute, processes)
    model, prompts, setting, folder = loaded.model, loaded.prompts, loaded.setting, args.output_dir
    method = method_class(args.method)(setting, args.options)
    labels = prompts.request.labels(prompts.pictured)
    pictures = TextPictures(
        model, method, prompts.pictured, labels, prompts.forgotten, args.request.samples_per_prompt, folder / "samples"
    )

    def evaluate(averaged: nn.Module, step: int) -> None:
        pictures.after(averaged, f"step-{step:06d}")

    before: list[torch.Tensor] = []

    def describe() -> None:
        write_json(folder / "config.json", {**args.describe(), **loaded.hashes, "num_processes": processes.size})
        before.append(pictures.before(args.request.sample_guidance_scale, args.request.sample_steps))

    words = ["unlearn", "--preset", args.preset, "--method", args.method, "--output_dir", str(folder)]
    words += ["--pretrained_model_name_or_path", str(args.request.pretrained_model_name_or_path)]
    request = args.request
    running = Running(
        method,
        folder,
        args.loop,
        compute,
        processes,
        setting.compute.regions,
        request.report_to,
        request.progress_bar,
        words,
    )
    progress, profiler = running.run(loaded.fingerprint, evaluate, describe)
    metrics: dict[str, Any] = {}
    mask = method.phases[-1].last_mask()

    def finish(averaged: nn.Module) -> None:
        metrics.update(_finish(args, method, averaged, mask, model, pictures, before[0], progress, loaded.source))

    report_profile(profiler, folder, processes)
    with method.phases[-1].averaged() as averaged:
        processes.on_main(lambda: finish(averaged))
    return metrics


def _embeddings(
    args: UnlearnTextArguments, compute: ComputeArguments, processes: World, model: StableDiffusion, prompts: Prompts
) -> torch.Tensor:
    low = compute.mixed_precision == "bf16" or args.memory.weights_dtype == "bfloat16"
    found = (model, prompts.request.prompts, args.output_dir, torch.device(compute.device))
    dtype = torch.bfloat16 if low else torch.float32
    # One process computes them, the others read what it has written.
    processes.on_main(lambda: encoded(*found, dtype))
    return encoded(*found, dtype)


def _fingerprint(
    args: UnlearnTextArguments, compute: ComputeArguments, prompts: Prompts, hashes: dict[str, str]
) -> dict[str, Any]:
    asked = prompts.request
    texts = json.dumps([asked.retain, asked.forget, asked.cover, asked.negative])
    return {
        "method": args.method,
        "options": dataclasses.asdict(args.options),
        **hashes,
        "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "resolution": args.request.resolution,
        **{name: value for name, value in dataclasses.asdict(args.memory).items() if name not in HOW},
        "seed": compute.seed,
        "mixed_precision": compute.mixed_precision,
    }


def _finish(
    args: UnlearnTextArguments,
    method: Method,
    averaged: nn.Module,
    mask: SaliencyMask | None,
    model: StableDiffusion,
    pictures: TextPictures,
    before: torch.Tensor,
    progress: Progress,
    source: str,
) -> dict[str, Any]:
    folder, setting = args.output_dir, method.setting
    metrics = {"method": args.method, "seed": args.compute.seed, "pretrained": source, **method.sampler.summary()}
    # The teacher may have been rounded since (teacher_dtype): how far weights moved is told from what was read.
    start = setting.problem.initial_generator
    start = model.load_unet() if start is None else start.unet
    pictures.both(before, pictures.after(averaged))
    save_text_pipeline(folder, averaged.unet, model, getattr(args.options, "t_init", None))
    metrics |= record_weights(folder, averaged, start, mask)
    write_text_card(folder, args.describe(), source)
    record_result(folder, metrics, args.options.ema_decay, progress, setting.compute.device)
    return metrics


def estimate(args: UnlearnTextArguments) -> MemoryEstimate:
    """What a run would take: of the model in a local folder, of Stable Diffusion 1.5 where there is none yet."""
    path, resolution = args.request.pretrained_model_name_or_path, args.request.resolution
    compute, request = args.compute.resolved(), args.prompts().request
    if path is not None and Path(path).is_dir():
        model = resolve_text(path).parts
        unet, latent_size, schedule = model.config("unet"), model.latent_size(resolution), model.schedule
    else:
        path = "Stable Diffusion 1.5"
        unet, schedule = SD15, NoiseSchedule.linear()
        latent_size = SD15["sample_size"] if resolution is None else resolution // 8
    low = compute.mixed_precision == "bf16" or args.memory.weights_dtype == "bfloat16"
    return estimate_memory(
        method_class(args.method),
        args.options,
        unet=unet,
        latent_size=latent_size,
        schedule=schedule,
        request=request,
        placement=args.memory.placement(),
        mixed_precision=compute.mixed_precision,
        low_embeddings=low,
        model=str(path),
        processes=process_count(),
    )


def run_unlearn_text(args: UnlearnTextArguments) -> None:
    """The subcommand: prints the configuration and an estimate of the memory, or runs."""
    if args.request.dry_run:
        args.loop.check()
        check_placement(args, process_count())
        if process_number() > 0:
            return
        print(json.dumps(args.describe(), indent=1))
        if isinstance(args.options, ScoreForgettingOptions) and not args.memory.score_lora_rank:
            print(describe_memory(estimate(args)))
        else:
            print("memory: estimated for score forgetting without an adapter alone")
        return
    metrics = unlearn_text(args)
    if metrics:
        print(f"{metrics['images']} images in {metrics['seconds']:.0f} s; report: {args.output_dir / 'report.md'}")
