"""Networks and pipelines in memory. They are copied, so that the user's objects are not changed."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..diffusion.networks import unwrap
from ..diffusion.text import check_text_conditional
from ..hashing import weights_hash
from .stable_diffusion import StableDiffusion, bounded
from .stable_diffusion_xl import StableDiffusionXL
from .transformers import transformer_class

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def copied(module: nn.Module) -> nn.Module:
    """Copy a network in memory: float32 on the CPU in eval mode, with every parameter requiring grad.

    ValueError if the network has adapters, or weights that are not in memory.
    """
    module = unwrap(module)
    if getattr(module, "_hf_peft_config_loaded", False):
        raise ValueError(f"a {type(module).__name__} has adapters, expected plain weights: fuse and unload them first")
    if any(param.is_meta for param in module.parameters()):
        raise ValueError(f"a {type(module).__name__} is offloaded, expected its weights in memory: move it to a device")
    return copy.deepcopy(module).to("cpu", torch.float32).eval().requires_grad_(True)


class LoadedStableDiffusion(StableDiffusion):
    """A Stable Diffusion in memory: a pipeline of diffusers. Its parts are copied on request.

    Parameters
    ----------
    pipeline : DiffusionPipeline
        Has unet, vae, text_encoder, tokenizer and scheduler; of SDXL also text_encoder_2 and tokenizer_2.

    Raises
    ------
    ValueError
        If a part is missing, the U-Net is of another architecture, or it predicts neither the noise nor v.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        missing = [name for name in self.parts() if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(f"a {type(pipeline).__name__} is not a {self.name}: it has no {', '.join(missing)}")
        check_text_conditional(unwrap(pipeline.unet))
        self._check()

    def __str__(self) -> str:
        return f"the {type(self.pipeline).__name__}"

    def config(self, part: str) -> dict[str, Any]:
        module = unwrap(getattr(self.pipeline, part))
        config = module.config if isinstance(module.config, Mapping) else module.config.to_dict()
        return {"_class_name": type(module).__name__, **config}

    def load_unet(self) -> "UNet2DConditionModel":
        return copied(self.pipeline.unet)

    def load_vae(self) -> nn.Module:
        return copied(self.pipeline.vae).requires_grad_(False)

    def index(self) -> Mapping[str, Any]:
        return self.pipeline.config

    def load_tokenizer(self, part: str = "tokenizer") -> Any:
        tokenizer = copy.deepcopy(getattr(self.pipeline, part))
        return bounded(tokenizer, self.config(part.replace("tokenizer", "text_encoder")))

    def load_text_encoder(self, part: str = "text_encoder") -> nn.Module:
        return copied(getattr(self.pipeline, part)).requires_grad_(False)

    def load_scheduler(self) -> Any:
        return self.pipeline.scheduler.from_config(self.pipeline.scheduler.config)

    def text_encoder_hashes(self) -> list[str]:
        return [weights_hash(getattr(self.pipeline, encoder)) for _, encoder, _ in self.encoders]


class LoadedStableDiffusionXL(StableDiffusionXL, LoadedStableDiffusion):
    """An SDXL in memory."""


def read_stable_diffusion(model: Any) -> StableDiffusion:
    """The Stable Diffusion 1.x, 2.x or XL in a folder or in a pipeline of diffusers, or a model in ``TRANSFORMERS``.

    Parameters
    ----------
    model : str, PathLike or DiffusionPipeline
        Its configurations are read; its weights are not.

    Raises
    ------
    ValueError
        If a part is missing, the U-Net is another model's, or its scheduler cannot be used.
    """
    if isinstance(model, (str, os.PathLike)):
        kind: type[StableDiffusion] | None = transformer_class(model)
        if kind is None:
            kind = StableDiffusionXL if (Path(model) / "text_encoder_2").is_dir() else StableDiffusion
        return kind(model)
    if getattr(model, "transformer", None) is not None:
        raise ValueError(f"a {type(model).__name__} has a transformer, expected the folder that it was read from")
    xl = getattr(model, "text_encoder_2", None) is not None
    return LoadedStableDiffusionXL(model) if xl else LoadedStableDiffusion(model)
