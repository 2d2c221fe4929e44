"""Text-to-image models whose network is a transformer: one class each, named in ``TRANSFORMERS``.

Prompts are encoded and images are decoded by the parts of the model's own pipeline in diffusers. The result of a run is
that pipeline again, with the network that was trained: it draws in one step with num_inference_steps=1 and without
guidance.
"""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion.conditioning import EMBEDDINGS, Conditioning
from ..hashing import file_sha256
from .folders import load_unet
from .offline import loading, read_config
from .stable_diffusion import Prediction, StableDiffusion

# Prompts in a call of the text encoders.
BATCH = 16


class FlowTransformer(StableDiffusion):
    """A text-to-image model in a folder with a transformer in place of the U-Net.

    Parameters
    ----------
    folder : str or os.PathLike
        As the pipeline of diffusers saves it.

    Attributes
    ----------
    pipelines : tuple of str
        Classes of pipelines that save such folders.

    Raises
    ------
    ValueError
        If a part is missing, or the scheduler cannot be used.
    """

    denoiser = "transformer"
    pipelines: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    def _check(self) -> None:
        super()._check()
        if self.index().get("_class_name") not in self.pipelines:
            raise ValueError(
                f"{self} is saved by a {self.index().get('_class_name')}, expected one of {', '.join(self.pipelines)}"
            )

    def config(self, part: str) -> dict[str, Any]:
        return super().config("transformer" if part == "unet" else part)

    @property
    def prediction(self) -> Prediction:
        return Prediction(self.schedule.predicts)

    @property
    def vae_scale_factor(self) -> int:
        config = self.config("vae")
        return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)

    def latent_size(self, resolution: int | None) -> int:
        config = self.config("transformer")
        if resolution is None:
            return config["sample_size"]
        factor = self.vae_scale_factor * config["patch_size"]
        if resolution < factor or resolution % factor:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {factor}")
        return resolution // self.vae_scale_factor

    def check_one_step(self, t_init: int | None) -> None:
        super().check_one_step(t_init)
        last = self.schedule.num_train_timesteps - 1
        if t_init not in (None, last):
            raise ValueError(f"t_init is {t_init}, expected {last}: {self.name} draws in one step from pure noise")

    def load_vae(self) -> nn.Module:
        import diffusers

        kind = getattr(diffusers, self.config("vae")["_class_name"])
        return load_unet(kind, self.folder / "vae", "VAE").requires_grad_(False)

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        raise ValueError(
            f"method needs the cross-attention of a U-Net from tokens to pixels, which {self.name} does not have: "
            "expected another method"
        )

    def _pipeline(self, **parts: Any) -> Any:
        """The folder's pipeline with ``parts`` in place of its own. None leaves one out."""
        import diffusers

        index = self.index()
        # Parts that the folder was saved without, such as T5.
        absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
        with loading(self.folder, "pipeline"):
            return getattr(diffusers, index["_class_name"]).from_pretrained(
                self.folder, local_files_only=True, torch_dtype=torch.float32, **{**absent, **parts}
            )

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Conditioning, list[str]]:
        pipeline = self._pipeline(transformer=None, vae=None).to(device)
        # Its configuration says how wide missing embeddings are.
        object.__setattr__(
            pipeline, "transformer", SimpleNamespace(config=SimpleNamespace(**self.config("transformer")))
        )
        batches = [
            self.conditioning(pipeline, list(prompts[i : i + BATCH]), device) for i in range(0, len(prompts), BATCH)
        ]
        tensors = {name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]}
        return Conditioning(tensors).to(dtype=dtype), self.truncated(pipeline, prompts)

    def conditioning(self, pipeline: Any, prompts: list[str], device: torch.device | str) -> dict[str, Tensor]:
        """What the network is told about prompts, by the keyword of the tensor, as the pipeline computes it."""
        raise NotImplementedError

    def truncated(self, pipeline: Any, prompts: Sequence[str]) -> list[str]:
        """Prompts of which even the encoder for the longest ones does not see the end."""
        lengths = [(getattr(pipeline, name), limit) for name, limit in self.limits(pipeline).items()]
        return [p for p in prompts if all(len(tokenizer(p).input_ids) > limit for tokenizer, limit in lengths)]

    def limits(self, pipeline: Any) -> dict[str, int]:
        """Tokens that each tokenizer's encoder sees, by the tokenizer's name."""
        raise NotImplementedError

    def build_pipeline(self, unet: nn.Module, t_init: int | None, prediction: Prediction) -> Any:
        return self._pipeline(transformer=unet, scheduler=self.scheduler_for(t_init, prediction))

    def scheduler_for(self, t_init: int | None, prediction: Prediction) -> Any:
        """The model's own scheduler; for one step of another than these Euler's, which then draws x_0 = x - v."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = self.load_scheduler()
        if t_init is None or type(scheduler).__name__ in ("FlowMatchEulerDiscreteScheduler", "SCMScheduler"):
            return scheduler
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=scheduler.config.num_train_timesteps, shift=scheduler.config.flow_shift
        )


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5: two CLIP encoders, and T5 unless the folder has none."""

    name = "Stable Diffusion 3"
    pipelines = ("StableDiffusion3Pipeline",)
    encoders: ClassVar = (
        ("tokenizer", "text_encoder", "CLIPTextModelWithProjection"),
        ("tokenizer_2", "text_encoder_2", "CLIPTextModelWithProjection"),
    )

    def text_encoder_hashes(self) -> list[str]:
        return [*super().text_encoder_hashes(), *_hashes(self.folder / "text_encoder_3")]

    def conditioning(self, pipeline: Any, prompts: list[str], device: torch.device | str) -> dict[str, Tensor]:
        options = {"device": device, "do_classifier_free_guidance": False}
        embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, **options)
        return {EMBEDDINGS: embeddings, "pooled_projections": pooled}

    def limits(self, pipeline: Any) -> dict[str, int]:
        clip = {name: pipeline.tokenizer_max_length for name, _, _ in self.encoders}
        # The pipeline's default.
        return clip if pipeline.text_encoder_3 is None else {**clip, "tokenizer_3": 256}


class Sana(FlowTransformer):
    """SANA and SANA-Sprint. Sprint is told the guidance scale that its pipeline uses by default."""

    name = "SANA"
    pipelines = ("SanaPipeline", "SanaSprintPipeline")
    encoders: ClassVar = (("tokenizer", "text_encoder", "Gemma2Model"),)

    def _default(self, pipeline: Any, name: str) -> Any:
        """The default of an argument of the pipeline's call."""
        return inspect.signature(type(pipeline).__call__).parameters[name].default

    def conditioning(self, pipeline: Any, prompts: list[str], device: torch.device | str) -> dict[str, Tensor]:
        options = {"device": device, "complex_human_instruction": self._default(pipeline, "complex_human_instruction")}
        if type(pipeline).__name__ == "SanaPipeline":
            options["do_classifier_free_guidance"] = False
        embeddings, mask = pipeline.encode_prompt(prompts, **options)[:2]
        tensors = {EMBEDDINGS: embeddings, "encoder_attention_mask": mask}
        config = self.config("transformer")
        if config.get("guidance_embeds"):
            scale = self._default(pipeline, "guidance_scale") * config["guidance_embeds_scale"]
            tensors["guidance"] = torch.full((len(prompts),), scale)
        return tensors

    def limits(self, pipeline: Any) -> dict[str, int]:
        return {"tokenizer": self._default(pipeline, "max_sequence_length")}


# The next transformer is a class above, an entry here and one in ``diffusion.architectures``, and a test.
TRANSFORMERS: dict[str, type[FlowTransformer]] = {
    "SD3Transformer2DModel": StableDiffusion3,
    "SanaTransformer2DModel": Sana,
}


def _hashes(folder: Path) -> list[str]:
    return [file_sha256(file) for file in sorted(folder.glob("*.safetensors"))]


def transformer_class(folder: str | os.PathLike) -> type[FlowTransformer] | None:
    """The class of the model in a folder, None if it has no transformer.

    ValueError if it has one of another kind.
    """
    path = Path(folder) / "transformer" / "config.json"
    if not path.is_file():
        return None
    kind = read_config(path).get("_class_name")
    if kind not in TRANSFORMERS:
        raise ValueError(f"{path} has _class_name {kind!r}, expected one of {', '.join(TRANSFORMERS)}")
    return TRANSFORMERS[kind]
