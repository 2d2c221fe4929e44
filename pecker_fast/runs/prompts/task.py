"""Forgetting prompts of a text-to-image model: the request, the networks, and how a run is pictured and saved."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion import Conditioning, NoiseSchedule
from ...hashing import file_sha256, weights_hash
from ...models import (
    AUTO,
    KNOWN,
    KnownGenerator,
    Prediction,
    StableDiffusion,
    is_hub_file,
    is_hub_name,
    known_generator,
    one_step_of,
    recorded_one_step,
    resolve_config,
    resolve_text,
    resolve_text_unet,
    save_result,
    save_text_pipeline,
)
from ...parallel import World, process_count
from ...training.loop import Progress
from ...training.memory import SD15, SDXL, MemoryEstimate, describe_memory, estimate_memory
from ...unlearning import Method, Problem, Setting, method_class, method_names
from ...unlearning.options import ScoreForgettingOptions
from ...unlearning.selective_amnesia import SelectiveAmnesiaOptions
from ..arguments import ComputeArguments, UnlearnArguments, with_options
from ..distilled import INITIAL, initial_paths
from ..fisher_file import load_fisher
from ..presets import method_loop, method_options, method_values, prompt_preset
from ..task import SAME, Task
from .embeddings import embed_prompts
from .pictures import PromptPictures
from .request import MemoryArguments, PromptRequestArguments, Prompts, resolve_prompts

# Options of memory that do not change the numbers of a run.
NEUTRAL = ("gradient_checkpointing", "fsdp", "share_weights", "saliency_parts")


class PromptTask(Task):
    """Prompts of a Stable Diffusion are forgotten."""

    same = (*SAME, "concept", "cover", "concepts", "retain_prompts", "resolution", "weights_dtype", "master_weights")
    same += ("teacher_dtype", "score_lora_rank", "fisher")
    settable = ("options", "resources", "samples_per_prompt", "sample_steps", "sample_guidance_scale")

    @staticmethod
    def defaults(preset_name: str, method: str) -> UnlearnArguments:
        prompt_preset(preset_name)
        kind = method_class(method)
        memory = MemoryArguments(**method_values(preset_name, kind, MemoryArguments))
        options, loop = method_options(preset_name, kind), method_loop(preset_name, kind)
        return UnlearnArguments(preset_name, method, options, PromptRequestArguments(), memory, loop=loop)

    @staticmethod
    def describe(args: UnlearnArguments) -> dict[str, Any]:
        prompts = prompts_of(args)
        return {
            "method": args.method,
            "preset": args.preset,
            "task": prompt_preset(args.preset).subject,
            **dataclasses.asdict(args.request),
            "concept": prompts.concept,
            "cover": prompts.cover,
            "concepts": [list(pair) for pair in prompts.concepts] or None,
            "output_dir": str(args.folder),
            **args.output.describe(),
            **dataclasses.asdict(args.resources),
            **dataclasses.asdict(args.compute.resolved()),
            **dataclasses.asdict(args.loop),
            "prompts": {
                "retain": len(prompts.request.retain),
                "forget": list(prompts.request.forget),
                "cover": list(prompts.request.cover),
                "negative": prompts.request.negative,
                "pictured": list(prompts.pictured),
            },
            "options": dataclasses.asdict(args.options),
        }

    @staticmethod
    def check(args: UnlearnArguments) -> None:
        args.loop.check()
        args.output.check()
        _check_method(args)
        prompts_of(args)
        _check_placement(args, process_count())

    @classmethod
    def rehearse(cls, args: UnlearnArguments, compute: ComputeArguments) -> list[str]:
        request = args.request
        cls._check_fisher(args)
        if request.fisher is not None and not Path(request.fisher).is_file():
            raise ValueError(f"fisher is {request.fisher!r}, no such file")
        for name, path in initial_paths(request)[0].items():
            on_hub = is_hub_file(path) or (not Path(path).exists() and is_hub_name(path))
            # Nothing is fetched, and a file has no configuration.
            if not on_hub and not Path(path).is_file():
                resolve_config(path, name=name)
        if request.pretrained_model_name_or_path is None:
            args.options.check()
            return ["a run also needs pretrained_model_name_or_path: presets of text-to-image models come without one"]
        args.options.check(resolve_text(request.pretrained_model_name_or_path).parts.schedule.num_train_timesteps)
        return []

    @staticmethod
    def settled(args: UnlearnArguments) -> UnlearnArguments:
        path, kind = args.request.initial_generator, args.request.generator_kind
        if path is None:
            if kind != AUTO:
                raise ValueError(
                    f"generator_kind is {kind!r}, but initial_generator is not given: expected it, or auto"
                )
            return args
        one_step = one_step_of(path, kind)
        if one_step is None or not hasattr(args.options, "t_init"):
            return args
        own = args.options.t_init
        usual = PromptTask.defaults(args.preset, args.method).options.t_init
        if own not in (one_step.t_init, usual):
            raise ValueError(
                f"t_init is {own}, but {path} draws in one step at {one_step.t_init}: leave t_init out, or choose "
                "--generator_kind plain"
            )
        return with_options(args, {"t_init": one_step.t_init})

    @staticmethod
    def estimate(args: UnlearnArguments) -> str | None:
        path = args.request.pretrained_model_name_or_path
        if prompt_preset(args.preset).flow and (path is None or not Path(path).is_dir()):
            return "memory: estimated for the folder of a model, by --pretrained_model_name_or_path"
        if isinstance(args.options, ScoreForgettingOptions) and not args.resources.score_lora_rank:
            return describe_memory(memory_of(args))
        return "memory: estimated only for score forgetting without an adapter"

    def __init__(self, args: UnlearnArguments, compute: ComputeArguments, world: World) -> None:
        self.args, request = args, args.request
        _check_method(args)
        self._check_fisher(args)
        self.prompts: Prompts = prompts_of(args)
        _check_placement(args, world.size)
        model = resolve_text(request.pretrained_model_name_or_path)
        self.model, self.source = model.parts, model.source
        args.options.check(self.model.schedule.num_train_timesteps)
        self.model.check_one_step(getattr(args.options, "t_init", None))
        unet = model.load_unet()
        self.hashes = {"pretrained_sha256": weights_hash(unet)}
        paths, distilled = initial_paths(request)
        if distilled is not None:
            distilled.check_base(self.hashes["pretrained_sha256"])
        initial = {name: resolve_text_unet(path, parts=self.model, name=name) for name, path in paths.items()}
        self.hashes |= {f"{name}_sha256": weights_hash(x) for name, x in initial.items()}
        fisher = self._read_fisher(unet)
        network = self.model.network(self._conditioning(compute, world), resolution_of(request, self.model), unet)
        networks = {name: network.like(x) for name, x in initial.items()}
        if "initial_generator" in paths:
            # Its own folder says how a distilled one draws.
            kind = request.generator_kind if distilled is None else AUTO
            one_step = one_step_of(paths["initial_generator"], kind)
            prediction = self.model.prediction if one_step is None else one_step.prediction
            networks["initial_generator"] = network.like(
                initial["initial_generator"], prediction.prediction_type, prediction.unit_noise
            )
        problem = Problem(
            network,
            self.model.schedule,
            self.prompts.request,
            fisher=fisher,
            prompt_tokens=self._tokens(),
            **networks,
        )
        self.setting = Setting(problem, compute.as_compute(world), args.resources.as_placement())
        self.pictures: PromptPictures | None = None

    @staticmethod
    def _check_fisher(args: UnlearnArguments) -> None:
        path, method = args.request.fisher, args.method
        needed = isinstance(args.options, SelectiveAmnesiaOptions)
        if needed and path is None:
            raise ValueError("fisher is not given: expected the file that pecker-fast fisher makes of the same model")
        if not needed and path is not None:
            raise ValueError(f"fisher is {path!r}, but {method} takes none: it is for --method selective_amnesia")

    def _read_fisher(self, unet: nn.Module) -> dict[str, Tensor] | None:
        """The Fisher information in the given file, whose hash is added to ``hashes``; None without a file."""
        path = self.args.request.fisher
        if path is None:
            return None
        fisher = load_fisher(path, unet, self.hashes["pretrained_sha256"], self.args.options.loss_reduction)
        self.hashes["fisher_sha256"] = file_sha256(Path(path))
        return fisher

    def _tokens(self) -> list[list[int]] | None:
        """Tokens of all prompts; None if the method needs none."""
        return (
            self.model.tokenize(self.prompts.request.prompts) if method_class(self.args.method).reads_tokens else None
        )

    def _conditioning(self, compute: ComputeArguments, world: World) -> Conditioning:
        """Conditioning of all prompts: the main process encodes them into the folder, and the others read it."""
        low = compute.mixed_precision == "bf16" or self.args.resources.weights_dtype == "bfloat16"
        dtype = torch.bfloat16 if low else torch.float32
        folder, prompts = self.args.folder, self.prompts.request.prompts

        def encode() -> Conditioning:
            folder.mkdir(parents=True, exist_ok=True)
            return embed_prompts(self.model, prompts, folder, torch.device(compute.device), dtype)

        world.on_main(encode)
        return encode()

    def fingerprint(self) -> dict[str, Any]:
        request = self.prompts.request
        texts = json.dumps([request.retain, request.forget, request.cover, request.negative])
        memory = dataclasses.asdict(self.args.resources)
        return {
            "method": self.args.method,
            "options": dataclasses.asdict(self.args.options),
            **self.hashes,
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "resolution": self.args.request.resolution,
            **{name: value for name, value in memory.items() if name not in NEUTRAL},
            "seed": self.setting.compute.seed,
            "mixed_precision": self.setting.compute.mixed_precision,
        }

    def config(self) -> dict[str, Any]:
        known = _known(self.args.request)
        return {} if known is None else {"known_generator": str(known)}

    def prepare(self, method: Method) -> None:
        prompts, samples = self.prompts, self.args.folder / "samples"
        labels = prompts.request.labels(prompts.pictured)
        per_prompt = self.args.request.samples_per_prompt
        self.method = method
        self.pictures = PromptPictures(
            self.model, method, prompts.pictured, labels, prompts.forgotten, per_prompt, samples
        )

    def draw_before(self, before: Tensor | None) -> Tensor | None:
        # Not shared: runs may have teachers of other dtypes.
        request = self.args.request
        self.before = self.pictures.before(request.sample_guidance_scale, request.sample_steps)
        return None

    @property
    def evaluates(self) -> bool:
        return self.pictures is not None

    def evaluate(self, network: nn.Module, step: int) -> dict[str, Any] | None:
        self.pictures.after(network, f"step-{step:06d}")
        return None

    def export(self, network: nn.Module, folder: Path) -> None:
        save_result(folder, network, self.setting.problem.schedule)

    def start(self) -> nn.Module:
        # The teacher may have been rounded since (teacher_dtype).
        initial = self.setting.problem.initial_generator
        return self.model.load_unet() if initial is None else initial.unet

    def finish(self, network: nn.Module, progress: Progress) -> dict[str, Any]:
        self.pictures.both(self.before, self.pictures.after(network))
        self._save(network)
        return {}

    def _save(self, network: nn.Module) -> None:
        prediction = Prediction(network.prediction_type, network.unit_noise)
        t_init = getattr(self.args.options, "t_init", None)
        save_text_pipeline(self.args.folder, network.unet, self.model, t_init, prediction)


def resolution_of(request: PromptRequestArguments, model: StableDiffusion) -> int | None:
    """Size of the images: as set, otherwise what the given generator was trained for, as its folder or its name says.

    None for the size that the model was trained for.
    """
    path = request.initial_generator
    if request.resolution is not None or path is None:
        return request.resolution
    factor = model.vae_scale_factor
    if Path(path).is_dir():
        size = resolve_config(path, name="initial_generator").get("sample_size")
        return size * factor if isinstance(size, int) else None
    known = _known(request)
    return None if known is None else min(known.pixels, factor * model.latent_size(None))


def _known(request: PromptRequestArguments) -> KnownGenerator | None:
    """The published generator that is given; None if it is none, or says itself how it draws."""
    path, kind = request.initial_generator, request.generator_kind
    if path is None or (kind == AUTO and recorded_one_step(path) is not None):
        return None
    key = known_generator(path) if kind == AUTO else kind
    return KNOWN.get(key)


def prompts_of(args: UnlearnArguments) -> Prompts:
    """The prompts of a run. ValueError if a file is missing, or something does not fit."""
    return resolve_prompts(args.request, prompt_preset(args.preset), args.compute.seed)


def _check_method(args: UnlearnArguments) -> None:
    """Raise ValueError if the method does not take prompts."""
    if not method_class(args.method).forgets_prompts:
        takers = ", ".join(name for name in method_names() if method_class(name).forgets_prompts)
        raise ValueError(
            f"method is {args.method!r}, which forgets classes of a class-conditional network, not prompts: expected "
            f"one of {takers}"
        )


def _check_placement(args: UnlearnArguments, processes: int) -> None:
    """Raise ValueError if the method cannot keep its networks as ``resources`` says."""
    method, placement = method_class(args.method), args.resources.as_placement()
    placement.check_method(method, args.options, processes=processes, compile=args.compute.torch_compile)


def memory_of(args: UnlearnArguments) -> MemoryEstimate:
    """The memory that a run would take: of the model in a local folder, otherwise of Stable Diffusion 1.5 or XL."""
    path, resolution = args.request.pretrained_model_name_or_path, args.request.resolution
    compute = args.compute.resolved()
    if path is not None and Path(path).is_dir():
        model = resolve_text(path).parts
        size = model.latent_size(resolution_of(args.request, model))
        config, schedule = model.config("unet"), model.schedule
    else:
        path, config = (
            ("Stable Diffusion XL", SDXL) if prompt_preset(args.preset).xl else ("Stable Diffusion 1.5", SD15)
        )
        schedule = NoiseSchedule.linear()
        size = config["sample_size"] if resolution is None else resolution // 8
    low = compute.mixed_precision == "bf16" or args.resources.weights_dtype == "bfloat16"
    return estimate_memory(
        method_class(args.method),
        args.options,
        unet=config,
        latent_size=size,
        schedule=schedule,
        request=prompts_of(args).request,
        placement=args.resources.as_placement(),
        mixed_precision=compute.mixed_precision,
        low_embeddings=low,
        model=str(path),
        processes=process_count(),
        others=_started_elsewhere(args.request),
    )


def _started_elsewhere(request: PromptRequestArguments) -> list[str]:
    """Which of psi ("score") and theta ("generator") start from other weights than the pretrained ones."""
    prefix = "initial_"
    return [name.removeprefix(prefix) for name in INITIAL if request.distilled or getattr(request, name) is not None]
