"""Stable Diffusion 1.x and 2.x in a folder that diffusers reads. Its parts are loaded one at a time."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion.networks import unwrap
from ..diffusion.parametrisation import Parametrisation
from ..diffusion.text import (
    PromptTable,
    TextConditioned,
    check_text_conditional,
    encode_prompts,
    tokenize_prompts,
)
from ..files import write_folder
from ..hashing import file_sha256
from .folders import WEIGHTS, load_unet
from .schedules import SCHEDULER_CONFIG, schedule_from_config

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# Its parts, and the file that each must have.
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "",
    "scheduler": SCHEDULER_CONFIG,
}


def load_text_unet(folder: str | os.PathLike) -> "UNet2DConditionModel":
    """Read the U-Net in ``folder``. Never asks a hub.

    Returns
    -------
    UNet2DConditionModel
        float32 on the CPU in eval mode.

    Raises
    ------
    ValueError
        If there is none, it is of another architecture, or its weights do not fit.
    """
    from diffusers import UNet2DConditionModel

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a U-Net: there is no config.json")
    kind = json.loads((folder / "config.json").read_text()).get("_class_name")
    if kind != "UNet2DConditionModel":
        raise ValueError(f"{folder} has a {kind}, expected a UNet2DConditionModel")
    files = list(folder.glob(f"{WEIGHTS}*.safetensors"))
    variant = "fp16" if files == [folder / f"{WEIGHTS}.fp16.safetensors"] else None
    unet = load_unet(UNet2DConditionModel, folder, variant=variant)
    check_text_conditional(unet)
    return unet


class StableDiffusion:
    """A Stable Diffusion in a folder, as ``StableDiffusionPipeline`` and the one-step pipeline save it.

    Parts are read on request and not cached: neither the text encoder nor the VAE stays in memory while the U-Net is
    trained.

    Parameters
    ----------
    folder : str or os.PathLike
        Has unet/, vae/, text_encoder/, tokenizer/ and scheduler/.

    Raises
    ------
    ValueError
        If a part is missing, or the U-Net predicts neither the noise nor v.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        missing = [name for name, file in PARTS.items() if not (self.folder / name / file).exists()]
        if missing:
            raise ValueError(f"{self.folder} is not the folder of a Stable Diffusion: it has no {', '.join(missing)}")
        self.schedule  # noqa: B018  (raises if it cannot be used)

    def __str__(self) -> str:
        return str(self.folder)

    def config(self, part: str) -> dict[str, Any]:
        """Configuration of a part: "unet", "vae", "text_encoder" or "scheduler"."""
        return json.loads((self.folder / part / PARTS[part]).read_text())

    @property
    def schedule(self) -> Parametrisation:
        """The noise levels that the U-Net was trained on, and what it predicts."""
        return schedule_from_config(self.config("scheduler"), f"{self}: scheduler/{SCHEDULER_CONFIG}")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    def latent_size(self, resolution: int | None) -> int:
        """Return the height and width of latents for images of ``resolution`` pixels.

        Parameters
        ----------
        resolution : int or None
            Height and width of images; None for the size that the U-Net was trained for.

        Raises
        ------
        ValueError
            If ``resolution`` is not a multiple of the factor by which autoencoder and U-Net downsample.
        """
        unet = self.config("unet")
        if resolution is None:
            size = unet["sample_size"]
            if not isinstance(size, int):
                raise ValueError(f"the U-Net's sample_size is {size}, expected one number: give a resolution")
            return size
        check_int("resolution", resolution, 1)
        factor = self.vae_scale_factor * 2 ** (len(unet["block_out_channels"]) - 1)
        if resolution % factor:
            raise ValueError(f"resolution is {resolution}, expected a multiple of {factor}")
        return resolution // self.vae_scale_factor

    def load_unet(self) -> "UNet2DConditionModel":
        """Load the U-Net, float32 on the CPU in eval mode. ValueError as by ``load_text_unet``."""
        return load_text_unet(self.folder / "unet")

    def load_vae(self) -> nn.Module:
        """Load the autoencoder, float32 on the CPU in eval mode, without gradients. ValueError if it cannot be read."""
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(
                self.folder / "vae", local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{self} has no VAE that can be read: {error}") from error
        return vae.eval().requires_grad_(False)

    def load_tokenizer(self) -> Any:
        """Load the tokenizer. ValueError if transformers is not installed, or it cannot be read."""
        return self._load_text_part("tokenizer", "CLIPTokenizer")

    def load_text_parts(self) -> tuple[Any, nn.Module]:
        """Load the tokenizer and the text encoder, float32 on the CPU in eval mode, without gradients.

        ValueError if transformers is not installed, or one of them cannot be read.
        """
        options = {"use_safetensors": True, "dtype": torch.float32}
        encoder = self._load_text_part("text_encoder", "CLIPTextModel", **options)
        return self.load_tokenizer(), encoder.eval().requires_grad_(False)

    def _load_text_part(self, part: str, kind: str, **options: Any) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise ValueError("prompts need transformers, which is not installed: pip install transformers") from error
        try:
            return getattr(transformers, kind).from_pretrained(self.folder / part, local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self} has no text encoder or tokenizer that can be read: {error}") from error

    def load_scheduler(self) -> Any:
        """Load the scheduler with the class in its configuration."""
        import diffusers

        kind = getattr(diffusers, self.config("scheduler").get("_class_name", ""), diffusers.DDPMScheduler)
        return kind.from_pretrained(self.folder / "scheduler", local_files_only=True)

    def text_encoder_hashes(self) -> list[str]:
        """sha256 of the text encoder's files, by which stored embeddings are matched to it."""
        return [file_sha256(file) for file in sorted((self.folder / "text_encoder").glob("*.safetensors"))]

    def encode(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, list[str]]:
        """Encode prompts in float32 on ``device``, which holds nothing afterwards.

        Returns
        -------
        embeddings : Tensor
            (N, tokens, width) of ``dtype`` on the CPU.
        truncated : list of str
            Prompts with more tokens than the encoder takes.

        Raises
        ------
        ValueError
            As by ``load_text_parts``.
        """
        tokenizer, encoder = self.load_text_parts()
        embeddings, truncated = encode_prompts(tokenizer, encoder.to(device), prompts)
        return embeddings.to(dtype), truncated

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Split prompts into tokens, as ``tokenize_prompts`` does. ValueError as by ``load_tokenizer``."""
        return tokenize_prompts(self.load_tokenizer(), prompts)

    def network(
        self, embeddings: Tensor, resolution: int | None = None, unet: nn.Module | None = None
    ) -> TextConditioned:
        """Combine a U-Net, by default this model's, with embeddings of prompts, the first of which is ""."""
        return TextConditioned(
            self.load_unet() if unet is None else unet,
            PromptTable(embeddings),
            self.latent_size(resolution),
        )

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        device: torch.device | str = "cpu",
        batch_size: int = 4,
        vae: nn.Module | None = None,
    ) -> Tensor:
        """Decode latents to images.

        Parameters
        ----------
        latents : Tensor
            (N, C, h, w), with the U-Net's scale.
        device : torch.device or str
            Where to compute.
        batch_size : int
            Images at a time.
        vae : nn.Module, optional
            The autoencoder on ``device``; loaded by default.

        Returns
        -------
        Tensor
            float32 (N, 3, H, W) in [-1, 1] on the CPU.
        """
        vae = self.load_vae().to(device) if vae is None else vae
        scale = vae.config.scaling_factor
        parts = [vae.decode(part.to(device).float() / scale).sample.cpu() for part in latents.split(batch_size)]
        return torch.cat(parts).clamp(-1, 1)


def save_text_network(path: str | os.PathLike, network: nn.Module) -> None:
    """Write the U-Net of a ``TextConditioned`` network as a folder of diffusers, atomically."""
    unet = unwrap(network).unet
    write_folder(path, lambda folder: unet.save_pretrained(folder, safe_serialization=True))


def save_text_pipeline(path: str | os.PathLike, unet: nn.Module, source: StableDiffusion, t_init: int | None) -> None:
    """Write a U-Net as a pipeline with the other parts of ``source``, atomically.

    ``DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)`` reads a one-step generator
    without this package; ``StableDiffusionPipeline`` can use its U-Net.

    Parameters
    ----------
    path : str or os.PathLike
        The folder.
    unet : nn.Module
        A ``UNet2DConditionModel``.
    source : StableDiffusion
        Provides text encoder, tokenizer, VAE and scheduler.
    t_init : int or None
        Timestep at which a one-step generator is fed noise; None for a model that draws in many steps, which becomes a
        ``StableDiffusionPipeline``.

    Raises
    ------
    ValueError
        If ``t_init`` is out of range, or a part of ``source`` cannot be read.
    """
    from diffusers import StableDiffusionPipeline

    from ..diffusion.text_pipeline import OneStepTextPipeline

    if t_init is not None:
        check_int("t_init", t_init, 0, source.schedule.num_train_timesteps)
    tokenizer, encoder = source.load_text_parts()
    parts = {"vae": source.load_vae(), "text_encoder": encoder, "tokenizer": tokenizer}
    parts |= {"unet": unet, "scheduler": source.load_scheduler()}
    if t_init is None:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **none)
    else:
        pipeline = OneStepTextPipeline(**parts, t_init=t_init)
    write_folder(path, lambda folder: pipeline.save_pretrained(folder, safe_serialization=True))
