"""Forgetting prompts of a text-to-image model: the request, the networks, and how a run is pictured and saved."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion import NoiseSchedule, TextConditioned
from ...hashing import file_sha256, weights_hash
from ...models import resolve_text, resolve_text_unet, save_result, save_text_pipeline
from ...parallel import World, process_count
from ...training.loop import Progress
from ...training.memory import SD15, MemoryEstimate, describe_memory, estimate_memory
from ...unlearning import Method, Problem, Setting, method_class, method_names
from ...unlearning.options import ScoreForgettingOptions
from ...unlearning.selective_amnesia import SelectiveAmnesiaOptions
from ..arguments import ComputeArguments, UnlearnArguments
from ..distilled import initial_paths
from ..fisher_file import load_fisher
from ..presets import method_loop, method_options, method_values, prompt_preset
from ..task import SAME, Task
from .embeddings import embed_prompts
from .pictures import PromptPictures
from .request import MemoryArguments, PromptRequestArguments, Prompts, resolve_prompts

# Options of memory that do not change the numbers of a run.
NEUTRAL = ("gradient_checkpointing", "fsdp")


class PromptTask(Task):
    """Prompts of a Stable Diffusion are forgotten."""

    same = (*SAME, "concept", "cover", "retain_prompts", "resolution", "weights_dtype", "master_weights")
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
        _check_method(args)
        prompts_of(args)
        _check_placement(args, process_count())

    @staticmethod
    def estimate(args: UnlearnArguments) -> str | None:
        if isinstance(args.options, ScoreForgettingOptions) and not args.resources.score_lora_rank:
            return describe_memory(memory_of(args))
        return "memory: estimated only for score forgetting without an adapter"

    def __init__(self, args: UnlearnArguments, compute: ComputeArguments, world: World) -> None:
        self.args, request = args, args.request
        _check_method(args)
        self._check_fisher()
        self.prompts: Prompts = prompts_of(args)
        _check_placement(args, world.size)
        model = resolve_text(request.pretrained_model_name_or_path)
        self.model, self.source = model.parts, model.source
        args.options.check(self.model.schedule.num_train_timesteps)
        unet = model.load_unet()
        self.hashes = {"pretrained_sha256": weights_hash(unet)}
        paths, distilled = initial_paths(request)
        if distilled is not None:
            distilled.check_base(self.hashes["pretrained_sha256"])
        initial = {name: resolve_text_unet(path, name=name) for name, path in paths.items()}
        self.hashes |= {f"{name}_sha256": weights_hash(x) for name, x in initial.items()}
        fisher = self._read_fisher(unet)
        embeddings = self._embeddings(compute, world)
        network = self.model.network(embeddings, request.resolution, unet)
        problem = Problem(
            network,
            self.model.schedule,
            self.prompts.request,
            fisher=fisher,
            prompt_tokens=self._tokens(),
            **{name: _with_prompts(x, network) for name, x in initial.items()},
        )
        self.setting = Setting(problem, compute.as_compute(world), args.resources.as_placement())
        self.pictures: PromptPictures | None = None

    def _check_fisher(self) -> None:
        path, method = self.args.request.fisher, self.args.method
        needed = isinstance(self.args.options, SelectiveAmnesiaOptions)
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

    def _embeddings(self, compute: ComputeArguments, world: World) -> Tensor:
        """Embeddings of all prompts: the main process encodes them into the folder, and the others read them."""
        low = compute.mixed_precision == "bf16" or self.args.resources.weights_dtype == "bfloat16"
        dtype = torch.bfloat16 if low else torch.float32
        folder, prompts = self.args.folder, self.prompts.request.prompts

        def encode() -> Tensor:
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
        return {}

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
        save_text_pipeline(self.args.folder, network.unet, self.model, getattr(self.args.options, "t_init", None))


def _with_prompts(unet: nn.Module, network: TextConditioned) -> TextConditioned:
    """``unet`` with the prompts of ``network``."""
    size = network.config["sample_size"]
    return TextConditioned(unet, network.table, size)


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
    """The memory that a run would take: of the model in a local folder, otherwise of Stable Diffusion 1.5."""
    path, resolution = args.request.pretrained_model_name_or_path, args.request.resolution
    compute = args.compute.resolved()
    if path is not None and Path(path).is_dir():
        model = resolve_text(path).parts
        config, size, schedule = model.config("unet"), model.latent_size(resolution), model.schedule
    else:
        path = "Stable Diffusion 1.5"
        config, schedule = SD15, NoiseSchedule.linear()
        size = SD15["sample_size"] if resolution is None else resolution // 8
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
    )
