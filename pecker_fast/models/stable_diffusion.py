"""Stable Diffusion 1.x and 2.x as a folder that diffusers reads: its U-Net, prompts and images, one part at a time."""

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion.networks import unwrap
from ..diffusion.schedule import NoiseSchedule
from ..diffusion.text import PREDICTION_TYPES, PromptTable, TextConditioned, check_text_conditional, encode_prompts
from ..files import write_folder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

PARTS = {"unet": "config.json", "vae": "config.json", "text_encoder": "config.json"}


def load_text_unet(folder: str | os.PathLike) -> "UNet2DConditionModel":
    """The U-Net in ``folder``, float32 on the CPU in eval mode. Never asks a hub.

    Raises ValueError where there is none, it is of another architecture, or its weights do not fit.
    """
    from diffusers import UNet2DConditionModel

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a U-Net: there is no config.json")
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    if kind != "UNet2DConditionModel":
        raise ValueError(f"{folder} holds a {kind}, expected a UNet2DConditionModel")
    variant = (
        None
        if list(folder.glob("diffusion_pytorch_model*.safetensors"))
        != [folder / "diffusion_pytorch_model.fp16.safetensors"]
        else "fp16"
    )
    try:
        unet, info = UNet2DConditionModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            torch_dtype=torch.float32,
            variant=variant,
        )
    except OSError as error:
        raise ValueError(f"{folder} has no safetensors weights that can be read: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{folder} has weights that do not fit its configuration: {error}") from error
    # diffusers fills what is missing with random numbers and goes on.
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{folder} has weights that do not fit its configuration: {wrong}")
    check_text_conditional(unet)
    return unet.eval()


@dataclass(frozen=True)
class StableDiffusion:
    """The folder of a Stable Diffusion, as ``StableDiffusionPipeline`` and the one-step pipeline save it.

    Its parts are read when they are asked for and held by the caller alone: neither the text encoder nor the VAE stays
    in memory while the U-Net is trained.

    Parameters
    ----------
    folder: has unet/, vae/, text_encoder/, tokenizer/ and scheduler/.

    Raises ValueError where a part is missing or the U-Net predicts something else than the noise or v.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        missing = [name for name, file in PARTS.items() if not (self.folder / name / file).is_file()]
        if not (self.folder / "tokenizer").is_dir():
            missing.append("tokenizer")
        if not (self.folder / "scheduler" / "scheduler_config.json").is_file():
            missing.append("scheduler")
        if missing:
            raise ValueError(f"{self.folder} is not the folder of a Stable Diffusion: it has no {', '.join(missing)}")
        self.schedule  # noqa: B018  (raises where it cannot be used)

    def config(self, part: str) -> dict:
        """Configuration of a part: "unet", "vae", "text_encoder" or "scheduler"."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return json.loads((self.folder / part / name).read_text())

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts."""
        return self.config("scheduler").get("prediction_type", "epsilon")

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise levels that it was trained on, whichever scheduler the folder names."""
        from diffusers import DDPMScheduler

        said = self.config("scheduler")
        known = inspect.signature(DDPMScheduler).parameters
        scheduler = DDPMScheduler(**{name: value for name, value in said.items() if name in known})
        return NoiseSchedule.from_scheduler(scheduler, PREDICTION_TYPES)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    def latent_size(self, resolution: int | None) -> int:
        """Height and width of latents of images of ``resolution`` pixels; None: what the U-Net was trained for.

        Raises ValueError where it is no multiple of what autoencoder and U-Net halve.
        """
        unet = self.config("unet")
        if resolution is None:
            size = unet["sample_size"]
            if not isinstance(size, int):
                raise ValueError(f"the U-Net is for latents of {size}, expected squares: give a resolution")
            return size
        check_int("resolution", resolution, 1)
        factor = self.vae_scale_factor * 2 ** (len(unet["block_out_channels"]) - 1)
        if resolution % factor:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {factor}")
        return resolution // self.vae_scale_factor

    def load_unet(self) -> "UNet2DConditionModel":
        """The U-Net, as ``load_text_unet`` has it."""
        return load_text_unet(self.folder / "unet")

    def encode(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, list[str]]:
        """Text embeddings (N, tokens, width) of ``dtype`` on the CPU, and the prompts that were cut; computed in
        float32 on ``device``, where nothing is left. Raises ValueError where transformers is missing or a part cannot
        be read."""
        tokenizer, encoder = self._text_parts()
        embeddings, cut = encode_prompts(tokenizer, encoder.to(device), prompts)
        return embeddings.to(dtype), cut

    def _text_parts(self) -> tuple:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError as error:
            raise ValueError("prompts need transformers, which is not installed: pip install transformers") from error
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
            encoder = CLIPTextModel.from_pretrained(
                self.folder / "text_encoder", local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder} has no text encoder or tokenizer that can be read: {error}") from error
        return tokenizer, encoder.eval().requires_grad_(False)

    def network(self, embeddings: Tensor, resolution: int | None = None, unet: nn.Module | None = None):
        """The ``TextConditioned`` network of ``unet`` (the folder's by default) and embeddings of prompts, the first of
        which is ""."""
        return TextConditioned(
            self.load_unet() if unet is None else unet,
            PromptTable(embeddings),
            self.schedule,
            self.prediction_type,
            self.latent_size(resolution),
        )

    def load_vae(self) -> nn.Module:
        """The autoencoder, float32 on the CPU in eval mode. ValueError where it cannot be read."""
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(
                self.folder / "vae", local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self.folder} has no VAE that can be read: {error}") from error
        return vae.eval().requires_grad_(False)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        device: torch.device | str = "cpu",
        batch_size: int = 4,
        vae: nn.Module | None = None,
    ) -> Tensor:
        """Images float32 (N, 3, H, W) in [-1, 1] on the CPU of latents (N, C, h, w) as the U-Net has them.

        ``vae``: the autoencoder, where the caller has it on ``device`` already.
        """
        vae = self.load_vae().to(device) if vae is None else vae
        scale = vae.config.scaling_factor
        parts = [vae.decode(part.to(device).float() / scale).sample.cpu() for part in latents.split(batch_size)]
        return torch.cat(parts).clamp(-1, 1)


def save_text_network(path: str | os.PathLike, network: nn.Module) -> None:
    """Writes the U-Net of a ``TextConditioned`` network in diffusers' layout, all or nothing."""
    unet = unwrap(network).unet
    write_folder(path, lambda folder: unet.save_pretrained(folder, safe_serialization=True))


def save_text_pipeline(path: str | os.PathLike, unet: nn.Module, source: StableDiffusion, t_init: int | None) -> None:
    """Writes a U-Net as a pipeline, with the other parts of ``source``, all or nothing.

    Parameters
    ----------
    unet: a ``UNet2DConditionModel``.
    source: where text encoder, tokenizer, VAE and scheduler come from.
    t_init: at which a one-step generator is fed noise; None for a model that draws in many steps, which becomes a
        ``StableDiffusionPipeline``.

    ``DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)`` reads a one-step generator
    where this package is not installed; ``StableDiffusionPipeline`` takes its U-Net.
    """
    import diffusers

    from ..diffusion.text_pipeline import OneStepTextPipeline

    if t_init is not None:
        check_int("t_init", t_init, 0, source.schedule.num_train_timesteps)
    tokenizer, encoder = source._text_parts()
    kind = getattr(diffusers, source.config("scheduler").get("_class_name", ""), diffusers.DDPMScheduler)
    scheduler = kind.from_pretrained(source.folder / "scheduler", local_files_only=True)
    parts = {"vae": source.load_vae(), "text_encoder": encoder, "tokenizer": tokenizer}
    parts |= {"unet": unet, "scheduler": scheduler}
    if t_init is None:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **none)
    else:
        pipeline = OneStepTextPipeline(**parts, t_init=t_init)
    write_folder(path, lambda folder: pipeline.save_pretrained(folder, safe_serialization=True))
