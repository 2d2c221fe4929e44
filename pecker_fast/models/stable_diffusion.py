"""Stable Diffusion in a folder that diffusers reads. Its parts are loaded one at a time."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion.architectures import ARCHITECTURES
from ..diffusion.conditioning import Conditioning, PromptTable
from ..diffusion.networks import unwrap
from ..diffusion.parametrisation import Parametrisation
from ..diffusion.text import (
    TextConditioned,
    check_text_conditional,
    encode_prompts,
    tokenize_prompts,
)
from ..files import write_folder
from ..hashing import file_sha256
from .folders import load_unet, read_unet_config
from .offline import loading, read_config
from .schedules import SCHEDULER_CONFIG, schedule_from_config

# Far more than any text encoder takes.
MAX_TOKENS = 1 << 16
# The file that a part must have, if any.
FILES = {"scheduler": SCHEDULER_CONFIG}


@dataclass(frozen=True)
class Prediction:
    """What a U-Net predicts, and of which input.

    Parameters
    ----------
    prediction_type : {"epsilon", "v_prediction", "sample"}
        The noise, v, or x_0.
    unit_noise : bool
        As of ``TextConditioned``.
    """

    prediction_type: str = "epsilon"
    unit_noise: bool = False


def load_text_unet(folder: str | os.PathLike) -> nn.Module:
    """Read the U-Net or transformer in ``folder``. Never asks a hub.

    Returns
    -------
    nn.Module
        A ``UNet2DConditionModel`` or another class in ``ARCHITECTURES``, float32 on the CPU in eval mode.

    Raises
    ------
    ValueError
        If there is none, it is of another architecture, or its weights do not fit.
    """
    import diffusers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a U-Net: there is no config.json")
    config = read_unet_config(folder, *ARCHITECTURES)
    unet = load_unet(getattr(diffusers, config["_class_name"]), folder)
    check_text_conditional(unet)
    return unet


def _variant(folder: Path) -> str | None:
    """The variant of weights to read: "fp16" if there is no other."""
    names = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


class StableDiffusion:
    """A Stable Diffusion 1.x or 2.x in a folder, as ``StableDiffusionPipeline`` and the one-step pipeline save it.

    Parts are read on request and not cached: neither text encoders nor the VAE stay in memory while the U-Net is
    trained.

    Parameters
    ----------
    folder : str or os.PathLike
        Has unet/, vae/, text_encoder/, tokenizer/ and scheduler/.

    Attributes
    ----------
    denoiser : str
        Part with the network that is trained.
    encoders : tuple
        Of each text encoder: part with its tokenizer, part with its weights, and its class.

    Raises
    ------
    ValueError
        If a part is missing, the U-Net is another model's, or its scheduler cannot be used.
    """

    name: ClassVar[str] = "Stable Diffusion"
    denoiser: ClassVar[str] = "unet"
    encoders: ClassVar[tuple[tuple[str, str, str], ...]] = (("tokenizer", "text_encoder", "CLIPTextModel"),)

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        files = {name: FILES.get(name, "" if name.startswith("tokenizer") else "config.json") for name in self.parts()}
        missing = [name for name, file in files.items() if not (self.folder / name / file).exists()]
        if missing:
            raise ValueError(f"{self.folder} is not the folder of a {self.name}: it has no {', '.join(missing)}")
        self._check()

    @classmethod
    def parts(cls) -> list[str]:
        """Names of the parts."""
        return [cls.denoiser, "vae", *(name for pair in cls.encoders for name in pair[1::-1]), "scheduler"]

    def _check(self) -> None:
        """Raise ValueError if the parts do not fit together, or the scheduler cannot be used."""
        self.schedule  # noqa: B018  (raises)

    def __str__(self) -> str:
        return str(self.folder)

    def config(self, part: str) -> dict[str, Any]:
        """Configuration of a part: "unet", "vae", "text_encoder" or "scheduler"."""
        return read_config(self.folder / part / FILES.get(part, "config.json"))

    def index(self) -> Mapping[str, Any]:
        """Configuration of the pipeline; empty if there is none."""
        path = self.folder / "model_index.json"
        return read_config(path) if path.is_file() else {}

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts."""
        kind = self.config("scheduler").get("prediction_type", "epsilon")
        return Prediction(kind, bool(self.index().get("unit_noise", False)))

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts, without its input."""
        return self.prediction.prediction_type

    @property
    def schedule(self) -> Parametrisation:
        """The noise levels that the U-Net was trained on, and what it returns."""
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

    def check_one_step(self, t_init: int | None) -> None:
        """Raise ValueError unless a pipeline can draw in one step at ``t_init``, which is None for many steps."""
        if t_init is not None:
            self.schedule.check_one_step(t_init)

    def load_unet(self) -> nn.Module:
        """Load the U-Net, float32 on the CPU in eval mode. ValueError as by ``load_text_unet``."""
        return load_text_unet(self.folder / self.denoiser)

    def load_vae(self) -> nn.Module:
        """Load the autoencoder, float32 on the CPU in eval mode, without gradients. ValueError if it cannot be read."""
        from diffusers import AutoencoderKL

        return load_unet(AutoencoderKL, self.folder / "vae", "VAE").requires_grad_(False)

    def load_tokenizer(self, part: str = "tokenizer") -> Any:
        """Load a tokenizer. ValueError if transformers is not installed, or it cannot be read."""
        tokenizer = self._load_text_part(part, "CLIPTokenizer")
        return bounded(tokenizer, self.config(part.replace("tokenizer", "text_encoder")))

    def load_text_encoder(self, part: str = "text_encoder") -> nn.Module:
        """Load a text encoder, float32 on the CPU in eval mode, without gradients.

        ValueError if transformers is not installed, or it cannot be read.
        """
        kind = next(kind for _, name, kind in self.encoders if name == part)
        options = {"use_safetensors": True, "dtype": torch.float32, "variant": _variant(self.folder / part)}
        return self._load_text_part(part, kind, **options).eval().requires_grad_(False)

    def _load_text_part(self, part: str, kind: str, **options: Any) -> Any:
        try:
            import transformers
        except ImportError as error:
            raise ValueError("prompts need transformers, which is not installed: pip install transformers") from error
        with loading(self.folder / part, part.replace("_", " ")):
            return getattr(transformers, kind).from_pretrained(self.folder / part, local_files_only=True, **options)

    def load_scheduler(self) -> Any:
        """Load the scheduler with the class in its configuration."""
        import diffusers

        config = self.config("scheduler")
        kind = getattr(diffusers, str(config.get("_class_name")), diffusers.DDPMScheduler)
        with loading(self.folder / "scheduler", "scheduler"):
            # From the object: from_pretrained takes a text in the file for a name on the hub.
            return kind.from_config(config)

    def load_other_parts(self) -> dict[str, Any]:
        """Load all parts but the U-Net and the scheduler, by name."""
        loaded: dict[str, Any] = {"vae": self.load_vae()}
        for tokenizer, encoder, _ in self.encoders:
            loaded |= {tokenizer: self.load_tokenizer(tokenizer), encoder: self.load_text_encoder(encoder)}
        return loaded

    def text_encoder_hashes(self) -> list[str]:
        """What stored embeddings are matched by: sha256 of the text encoders' files."""
        folders = [self.folder / encoder for _, encoder, _ in self.encoders]
        return [file_sha256(file) for folder in folders for file in sorted(folder.glob("*.safetensors"))]

    def encode(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Conditioning, list[str]]:
        """Encode prompts in float32 on ``device``, which holds nothing afterwards.

        Returns
        -------
        conditioning : Conditioning
            What the U-Net is told about the N prompts, of ``dtype`` on the CPU.
        truncated : list of str
            Prompts with more tokens than the encoder takes.

        Raises
        ------
        ValueError
            As by ``load_text_encoder``.
        """
        encoder = self.load_text_encoder().to(device)
        embeddings, truncated = encode_prompts(self.load_tokenizer(), encoder, prompts)
        return Conditioning.of(embeddings).to(dtype=dtype), truncated

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Split prompts into tokens, as ``tokenize_prompts`` does. ValueError as by ``load_tokenizer``."""
        return tokenize_prompts(self.load_tokenizer(), prompts)

    def network(
        self,
        conditioning: Conditioning | Tensor,
        resolution: int | None = None,
        unet: nn.Module | None = None,
        prediction: Prediction | None = None,
    ) -> TextConditioned:
        """Combine a U-Net, by default this model's, with the conditioning of prompts, the first of which is "".

        Parameters
        ----------
        conditioning : Conditioning or Tensor
            As ``encode`` returns it, or embeddings alone.
        resolution : int, optional
            Height and width of images; what the U-Net was trained for by default.
        unet : nn.Module, optional
            The U-Net; loaded by default.
        prediction : Prediction, optional
            What it predicts; as this model's by default.

        Returns
        -------
        TextConditioned
        """
        kind = self.prediction if prediction is None else prediction
        return TextConditioned(
            self.load_unet() if unet is None else unet,
            PromptTable(conditioning),
            self.schedule,
            kind.prediction_type,
            self.latent_size(resolution),
            kind.unit_noise,
        )

    def build_pipeline(self, unet: nn.Module, t_init: int | None, prediction: Prediction) -> Any:
        """A pipeline of diffusers with another U-Net.

        Parameters
        ----------
        unet, t_init
            As of ``save_text_pipeline``.
        prediction : Prediction
            What the U-Net predicts.

        Returns
        -------
        DiffusionPipeline
        """
        from diffusers import StableDiffusionPipeline

        from ..diffusion.text_pipeline import OneStepTextPipeline

        parts = {**self.load_other_parts(), "unet": unet, "scheduler": self.scheduler_for(t_init, prediction)}
        if t_init is None:
            none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return StableDiffusionPipeline(**parts, **none)
        return OneStepTextPipeline(**parts, t_init=t_init, unit_noise=prediction.unit_noise)

    def scheduler_for(self, t_init: int | None, prediction: Prediction) -> Any:
        """The scheduler to save beside another U-Net; arguments as of ``build_pipeline``."""
        scheduler = self.load_scheduler()
        if scheduler.config.get("prediction_type", "epsilon") == prediction.prediction_type:
            return scheduler
        return type(scheduler).from_config(scheduler.config, prediction_type=prediction.prediction_type)

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
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        parts = latents.split(batch_size)
        return torch.cat([vae.decode(z.to(device).float() / scale + shift).sample.cpu() for z in parts]).clamp(-1, 1)


def bounded(tokenizer: Any, text_encoder: Mapping[str, Any]) -> Any:
    """Set the length of a tokenizer whose files do not have it to that of its text encoder, and return it.

    transformers takes 1e30 instead. ValueError if the configuration of the text encoder lacks it, too.
    """
    if tokenizer.model_max_length > MAX_TOKENS:
        length = text_encoder.get("max_position_embeddings")
        if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= MAX_TOKENS:
            raise ValueError(
                f"tokenizer has no model_max_length, and text_encoder has max_position_embeddings {length!r}: set "
                "model_max_length in tokenizer/tokenizer_config.json"
            )
        tokenizer.model_max_length = length
    return tokenizer


def save_text_network(path: str | os.PathLike, network: nn.Module) -> None:
    """Write the U-Net of a ``TextConditioned`` network as a folder of diffusers, atomically."""
    unet = unwrap(network).unet
    write_folder(path, lambda folder: unet.save_pretrained(folder, safe_serialization=True))


def save_text_pipeline(
    path: str | os.PathLike,
    unet: nn.Module,
    source: StableDiffusion,
    t_init: int | None,
    prediction: Prediction | None = None,
) -> None:
    """Write a U-Net as a pipeline with the other parts of ``source``, atomically.

    ``DiffusionPipeline.from_pretrained(path, custom_pipeline=path, trust_remote_code=True)`` reads a one-step generator
    without this package; ``StableDiffusionPipeline`` and ``StableDiffusionXLPipeline`` can use its U-Net.

    Parameters
    ----------
    path : str or os.PathLike
        The folder.
    unet : nn.Module
        A ``UNet2DConditionModel``.
    source : StableDiffusion
        Provides text encoders, tokenizers, VAE and scheduler.
    t_init : int or None
        Timestep at which a one-step generator is fed noise; None for a model that draws in many steps, which becomes a
        ``StableDiffusionPipeline`` or a ``StableDiffusionXLPipeline``.
    prediction : Prediction, optional
        What the U-Net predicts; as that of ``source`` by default.

    Raises
    ------
    ValueError
        If ``t_init`` is out of range, or a part of ``source`` cannot be read.
    """
    source.check_one_step(t_init)
    pipeline = source.build_pipeline(unet, t_init, prediction or source.prediction)
    write_folder(path, lambda folder: pipeline.save_pretrained(folder, safe_serialization=True))
