"""Images of prompts: a Stable Diffusion or a one-step generator made of one, and the ways to draw with it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checks import check_int
from ..diffusion import OneStepGenerator, sample_ddim, sample_one_step
from ..diffusion.sld import sample_sld, sld_config
from ..hashing import weights_hash
from ..metrics import to_uint8
from ..models import StableDiffusion, load_text_unet
from .options import HUB_NAME, network_folder
from .sample import recorded_options
from .text_models import load_stable_diffusion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TextModel:
    """A U-Net and the Stable Diffusion that the other parts come from."""

    path: str
    source: StableDiffusion
    unet: nn.Module
    t_init: int | None

    @classmethod
    def read(cls, path: str, base: str | None = None) -> "TextModel":
        """The model in ``path``: a Stable Diffusion (a folder, or a name on the hub), the folder of a run, or that of a
        U-Net with the other parts in ``base``. ValueError where it is none of these."""
        folder, whole = Path(path), path if base is None else base
        try:
            if not Path(whole).exists() and HUB_NAME.fullmatch(whole):
                source = load_stable_diffusion(whole)[0]
            else:
                source = StableDiffusion(Path(whole))
        except ValueError as error:
            hint = "" if base is not None else "; the folder of a U-Net needs the others by --base"
            raise ValueError(f"{'model' if base is None else 'base'} is {whole!r}: {error}{hint}") from error
        unet = source.load_unet() if base is None else load_text_unet(network_folder(folder))
        return cls(str(path), source, unet, recorded_options(folder).get("t_init"))


@dataclass(frozen=True)
class SamplerOptions:
    """How images are drawn.

    Parameters
    ----------
    sampler: "one_step" at ``t_init``; "ddim" with guidance; "sld": that, steered away from ``safety_text``; "auto": in
        one step where the model says its t_init, otherwise by DDIM.
    sld: SLD's configuration.
    resolution: of images in pixels; what the U-Net was trained for by default.
    """

    sampler: Literal["auto", "one_step", "ddim", "sld"] = "auto"
    t_init: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sld: str = "max"
    safety_text: str | None = None
    resolution: int | None = None

    def resolved(self, model: TextModel) -> dict[str, Any]:
        """What settles the images beside weights and prompts, as JSON. ValueError where something does not fit."""
        t_init = model.t_init if self.t_init is None else self.t_init
        sampler = self.sampler
        if sampler == "auto":
            sampler = "ddim" if t_init is None else "one_step"
        steps = model.source.schedule.num_train_timesteps
        if sampler == "one_step":
            if t_init is None:
                raise ValueError("t_init is not given, and the model is not of a run that says it")
            check_int("t_init", t_init, 0, steps)
            found: dict[str, Any] = {"t_init": t_init, "num_inference_steps": 1}
        else:
            check_int("num_inference_steps", self.num_inference_steps, 1, steps + 1)
            if not 0 <= self.guidance_scale < float("inf"):
                raise ValueError(f"guidance_scale is {self.guidance_scale}, expected a number of at least 0")
            found = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        if sampler == "sld":
            if not self.safety_text:
                raise ValueError("safety_text is not given: SLD needs a text to steer away from")
            sld_config(self.sld)
            found |= {"sld": self.sld, "safety_text": self.safety_text}
        return {"sampler": sampler, **found, "latent_size": model.source.latent_size(self.resolution)}


class PromptSampler:
    """Draws images of prompts.

    Parameters
    ----------
    model, options: what and how.
    prompts: all that will be asked for, encoded at once; the text encoder is then dropped.
    device, dtype: of the U-Net ("auto": bfloat16 on a GPU); text encoder and VAE compute in float32.
    batch_size: images at a time.

    Attributes
    ----------
    settings: ``options`` resolved. cut: prompts that are longer than the text encoder takes.
    """

    def __init__(
        self,
        model: TextModel,
        options: SamplerOptions,
        prompts: Sequence[str],
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        batch_size: int = 8,
    ) -> None:
        if dtype == "auto":
            dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
        check_int("batch_size", batch_size, 1)
        self.settings = options.resolved(model)
        self.device, self.batch_size = torch.device(device), batch_size
        texts = list(dict.fromkeys(["", *prompts, *([options.safety_text] if options.safety_text else [])]))
        self._labels = {text: label for label, text in enumerate(texts)}
        self._embeddings, self.cut = model.source.encode(texts, self.device)
        self._settled = {**self.settings, "dtype": dtype, "unet_sha256": weights_hash(model.unet)}
        self.source, self._vae = model.source, model.source.load_vae()
        self._settled["vae_sha256"] = weights_hash(self._vae)
        self._vae.to(self.device)
        self.network = model.source.network(self._embeddings, options.resolution, model.unet)
        self.network.to(self.device, DTYPES[dtype])
        self.schedule = model.source.schedule.to(self.device)

    def describe(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What settles the images of ``prompts``, as JSON."""
        texts = ["", *prompts, self.settings.get("safety_text", "")]
        rows = self._embeddings[[self._labels[text] for text in texts]].contiguous()
        digest = hashlib.sha256(json.dumps(texts).encode())
        digest.update(rows.view(-1).view(torch.uint8).numpy())
        return {**self._settled, "prompts_sha256": digest.hexdigest()}

    def drawing(self, prompts: Sequence[str], guidance_scales: Sequence[float] = ()) -> Callable[[Tensor, int], Tensor]:
        """A function from int64 (n, 2), a number in ``prompts`` and a seed for each image, to uint8 (n, 3, H, W).

        ``guidance_scales``: of each prompt, in place of the options'.
        """
        labels = torch.tensor([self._labels[text] for text in prompts])
        scales = torch.full((len(prompts),), self.settings.get("guidance_scale", 1.0))
        if guidance_scales and "guidance_scale" in self.settings:
            scales = torch.tensor(guidance_scales, dtype=torch.float32)

        def draw(items: Tensor, _seed: int = 0) -> Tensor:
            numbers, seeds = items.unbind(1)
            images = None
            # A call has one scale.
            for scale in scales[numbers].unique().tolist():
                rows = (scales[numbers] == scale).nonzero().flatten()
                latents = self._latents(labels[numbers[rows]], scale, seeds[rows].tolist())
                part = to_uint8(self.source.decode(latents, self.device, self.batch_size, vae=self._vae))
                images = part.new_empty(len(items), *part.shape[1:]) if images is None else images
                images[rows] = part
            return images

        return draw

    def _latents(self, labels: Tensor, scale: float, seeds: list[int]) -> Tensor:
        common = {"batch_size": self.batch_size, "seed": seeds, "device": self.device}
        s = self.settings
        if s["sampler"] == "one_step":
            return sample_one_step(self.network, OneStepGenerator(self.schedule, s["t_init"]), labels, **common)
        if s["sampler"] == "ddim":
            steps = s["num_inference_steps"]
            return sample_ddim(self.network, self.schedule, labels, steps, guidance_scale=scale, **common)
        safety, config = self._labels[s["safety_text"]], sld_config(s["sld"])
        return sample_sld(
            self.network, self.schedule, labels, safety, config, s["num_inference_steps"], scale, **common
        )
