"""Stable Diffusion on the command line: found in a folder or on the hub, prompts encoded once, samples drawn."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..diffusion import Sampler, TextConditioned
from ..files import save_tensors
from ..models import StableDiffusion
from ..report import save_before_after, save_grid
from ..unlearning import Method

EMBEDDINGS = "prompts.safetensors"
# Pictures show images of at most this height.
SHOWN_PIXELS = 128


def encoded(
    model: StableDiffusion, prompts: Sequence[str], folder: Path, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Text embeddings of ``prompts``, of ``dtype`` on the CPU: read from the run's folder, or computed and kept there.

    What is there is of the same prompts and the same text encoder, or it is computed anew.
    """
    path = folder / EMBEDDINGS
    digest = hashlib.sha256(json.dumps([list(prompts), str(dtype)]).encode())
    for text_encoder in model.text_encoder_hashes():
        digest.update(text_encoder.encode())
    key = digest.hexdigest()
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("embeddings")
    except (OSError, safetensors.SafetensorError):
        pass
    embeddings, cut = model.encode(prompts, device, dtype)
    if cut:
        print(
            f"pecker-fast: {len(cut)} prompts are longer than the text encoder takes, such as {cut[0]!r}; they are cut",
            file=sys.stderr,
        )
    save_tensors(path, {"embeddings": embeddings.contiguous()}, {"key": key})
    return embeddings


class TextPictures:
    """Samples of fixed prompts and noise, in pictures: of the pretrained model once, and of the run as it goes on.

    The VAE is in memory only while a picture is made.

    Parameters
    ----------
    model: whose VAE decodes.
    method: of the run.
    prompts, labels: what is drawn, and its labels in the network's table; the first ``forgotten`` are framed.
    per_prompt: images of each.
    folder: where pictures go.
    """

    def __init__(
        self,
        model: StableDiffusion,
        method: Method,
        prompts: Sequence[str],
        labels: Sequence[int],
        forgotten: int,
        per_prompt: int,
        folder: Path,
    ) -> None:
        self.model, self.method, self.folder = model, method, folder
        self.prompts, self.framed = tuple(prompts), range(forgotten)
        self.labels = torch.tensor(labels).repeat_interleave(per_prompt)
        self.rows = torch.arange(len(prompts)).repeat_interleave(per_prompt)

    def _images(self, latents: Tensor) -> Tensor:
        images = self.model.decode(latents, self.method.setting.compute.device, batch_size=1)
        factor = max(1, images.shape[-1] // SHOWN_PIXELS)
        return nn.functional.avg_pool2d(images, factor) if factor > 1 else images

    def before(self, guidance_scale: float, steps: int) -> Tensor:
        """Images of the pretrained model, by DDIM, which are kept in before.png."""
        setting = self.method.setting
        with setting.compute.autocast():
            sampler = Sampler("ddim", num_inference_steps=steps, guidance_scale=guidance_scale, batch_size=1)
            latents = sampler.draw(setting.problem.teacher, setting.problem.schedule, self.labels, setting.compute.seed)
        images = self._images(latents)
        self._save("before", images)
        return images

    def after(self, network: nn.Module, name: str = "after") -> Tensor:
        """Images of a network of the run, which are kept under ``name``."""
        setting, sampler = self.method.setting, replace(self.method.sampler, batch_size=1)
        with setting.compute.autocast():
            latents = sampler.draw(network, setting.problem.schedule, self.labels, setting.compute.seed)
        images = self._images(latents)
        self._save(name, images)
        return images

    def both(self, before: Tensor, after: Tensor) -> None:
        """before_after.png."""
        place = self.folder / "before_after.png"
        save_before_after(place, before, after, self.rows, self._names, highlight=self.framed)

    @property
    def _names(self) -> list[str]:
        return [str(i + 1) for i in range(len(self.prompts))]

    def _save(self, name: str, images: Tensor) -> None:
        save_grid(self.folder / f"{name}.png", images, self.rows, self._names, highlight=self.framed)


def on_network(model: StableDiffusion, unet: nn.Module | None, network: TextConditioned) -> TextConditioned | None:
    """``unet`` with the prompts of ``network``, None where there is none."""
    if unet is None:
        return None
    return TextConditioned(
        unet, network.table, network.schedule, network.prediction_type, network.config["sample_size"]
    )
