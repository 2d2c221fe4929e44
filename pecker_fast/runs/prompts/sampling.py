"""Images of prompts: a Stable Diffusion or a one-step generator made of one, and the ways to draw with it."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...checks import check_choice, check_int
from ...diffusion import Sampler
from ...hashing import weights_hash
from ...metrics import to_uint8
from ...models import TextModel, resolve_text

# Prompts that are encoded at a time, where there can be many: 0.6 GB in float32 for SDXL.
BLOCK = 1000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_model(path: str, base: str | None = None) -> TextModel:
    """The model in ``path``: a Stable Diffusion (a folder, or a name on the hub), the folder of a run, or that of a
    U-Net with the other parts in ``base``. ValueError if it is none of these."""
    try:
        return resolve_text(path, base=base, name="model")
    except ValueError as error:
        hint = "" if base is not None else "; the folder of a U-Net needs the others by --base"
        raise ValueError(f"{error}{hint}") from error


@dataclass(frozen=True)
class SamplerOptions:
    """How images of prompts are drawn.

    Parameters
    ----------
    sampler : {"auto", "one_step", "ddim", "sld"}
        One step at ``t_init``; DDIM with guidance; that with safe latent diffusion, away from ``safety_text``; "auto":
        one step if the model records its t_init, otherwise DDIM.
    t_init : int, optional
        That of the model by default.
    num_inference_steps, guidance_scale
        Of "ddim" and "sld".
    sld : str
        Name of SLD's configuration.
    safety_text : str, optional
        What "sld" steers away from.
    resolution : int, optional
        Of images in pixels; what the U-Net was trained for by default.
    """

    sampler: Literal["auto", "one_step", "ddim", "sld"] = "auto"
    t_init: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sld: str = "max"
    safety_text: str | None = None
    resolution: int | None = None

    def sampler_of(self, model: TextModel, batch_size: int = 8) -> Sampler:
        """The sampler for a model. ValueError if an option is missing or out of range."""
        t_init = model.t_init if self.t_init is None else self.t_init
        kind = self.sampler
        if kind == "auto":
            kind = "ddim" if t_init is None else "one_step"
        if kind == "one_step":
            if t_init is None:
                raise ValueError("t_init is not given, and the model does not come from a run that recorded it")
            sampler = Sampler(kind, t_init=t_init, num_inference_steps=1, batch_size=batch_size)
        else:
            steered = {"sld": self.sld, "safety_text": self.safety_text or None} if kind == "sld" else {}
            sampler = Sampler(
                kind,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                batch_size=batch_size,
                **steered,
            )
        sampler.check(model.parts.schedule.num_train_timesteps)
        return sampler


class PromptSampler:
    """Draws images of prompts.

    Parameters
    ----------
    model, options : TextModel, SamplerOptions
        What draws, and how.
    prompts : sequence of str
        All that will be drawn, encoded at once; the text encoder is then dropped.
    device, dtype
        Of the U-Net ("auto": bfloat16 on a GPU); text encoder and VAE compute in float32.
    batch_size : int
        Images in a call of a network.

    Attributes
    ----------
    settings : dict
        The sampler and the size of latents, as JSON.
    cut : list of str
        Prompts that are longer than the text encoder takes.
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
        check_choice("dtype", dtype, ("auto", *DTYPES))
        check_int("batch_size", batch_size, 1)
        self.sampler = options.sampler_of(model, batch_size)
        # Without what does not apply, as caches of images have it.
        sampler = {name: value for name, value in self.sampler.describe().items() if value is not None}
        self.settings = {**sampler, "latent_size": model.parts.latent_size(options.resolution)}
        self.device, self.batch_size = torch.device(device), batch_size
        self.source, self.resolution, self.prediction = model.parts, options.resolution, model.prediction
        self.cut: list[str] = []
        self._encode([*prompts, *([options.safety_text] if options.safety_text else [])])
        unet = model.load_unet()
        self._settled = {**self.settings, "dtype": dtype, "unet_sha256": weights_hash(unet)}
        self._vae = model.parts.load_vae()
        self._settled["vae_sha256"] = weights_hash(self._vae)
        self._vae.to(self.device)
        if self.prediction != model.parts.prediction:
            self._settled["prediction"] = asdict(self.prediction)
        self.network = model.parts.network(self._conditioning, options.resolution, unet, self.prediction)
        self.network.to(self.device, DTYPES[dtype])
        self.schedule = model.parts.schedule.to(self.device)

    def describe(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Everything that settles the images of ``prompts``, as JSON."""
        texts = ["", *prompts, self.settings.get("safety_text", "")]
        digest = hashlib.sha256(json.dumps(texts).encode())
        for _, rows in self._conditioning[[self._labels[text] for text in texts]].items():
            digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy())
        return {**self._settled, "prompts_sha256": digest.hexdigest()}

    def describe_texts(self, prompts: Sequence[str]) -> dict[str, Any]:
        """``describe`` of ``prompts`` that have not been encoded: by their texts and the text encoders."""
        digest = hashlib.sha256(json.dumps([list(prompts), self.source.text_encoder_hashes()]).encode())
        return {**self._settled, "texts_sha256": digest.hexdigest()}

    def drawing_anew(self, prompts: Sequence[str]) -> Callable[[Tensor, int], Tensor]:
        """As ``drawing``, for prompts that need not have been encoded.

        They are encoded in blocks, when the first image of a block is drawn: any number of prompts takes the memory of
        one block. Prompts that were encoded before are lost.
        """
        encoded: list[range] = []

        def draw(items: Tensor, seed: int = 0) -> Tensor:
            numbers = items[:, 0]
            first, last = (int(number) // BLOCK for number in numbers.aminmax())
            block = range(first * BLOCK, min((last + 1) * BLOCK, len(prompts)))
            texts = prompts[block.start : block.stop]
            if encoded != [block]:
                self._encode([*texts, *([self.sampler.safety_text] if self.sampler.safety_text else [])])
                encoded[:] = [block]
            return self.drawing(texts)(torch.stack([numbers - block.start, items[:, 1]], 1), seed)

        return draw

    def _encode(self, prompts: Sequence[str]) -> None:
        """Encode prompts, after the empty one; the text encoder is dropped again."""
        texts = list(dict.fromkeys(["", *prompts]))
        self._labels = {text: label for label, text in enumerate(texts)}
        if self.sampler.safety_text is not None:
            self.sampler = replace(self.sampler, safety_label=self._labels[self.sampler.safety_text])
        self._conditioning, cut = self.source.encode(texts, self.device)
        self.cut = list(dict.fromkeys([*self.cut, *cut]))
        if hasattr(self, "network"):
            # Sizes and the like are added by the model.
            table = self.source.network(self._conditioning, self.resolution, self.network.unet, self.prediction).table
            table.to(self.device)
            self.network.table = table

    def drawing(self, prompts: Sequence[str], guidance_scales: Sequence[float] = ()) -> Callable[[Tensor, int], Tensor]:
        """A function from int64 (n, 2), the number of a prompt and a seed for each image, to uint8 (n, 3, H, W).

        ``guidance_scales``: one for each prompt, in place of the options' scale; not for one step.
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
                guidance = {"guidance_scale": scale} if "guidance_scale" in self.settings else {}
                sampler = replace(self.sampler, **guidance)
                latents = sampler.draw(self.network, self.schedule, labels[numbers[rows]], seeds[rows].tolist())
                part = to_uint8(self.source.decode(latents, self.device, self.batch_size, vae=self._vae))
                images = part.new_empty(len(items), *part.shape[1:]) if images is None else images
                images[rows] = part
            return images

        return draw
