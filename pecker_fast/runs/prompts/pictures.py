"""Pictures of a run's samples: of the pretrained model once, and of the run as it goes on."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...diffusion import Sampler
from ...models import StableDiffusion
from ...report import PROMPT_WIDTH, save_grid, save_side_by_side
from ...unlearning import Method

# Pictures show images of at most this height.
SHOWN_PIXELS = 128


class PromptPictures:
    """Draws samples of fixed prompts from fixed noise into pictures. The VAE is in memory only while it decodes.

    Parameters
    ----------
    model : StableDiffusion
        Whose VAE decodes.
    method : Method
        Of the run.
    prompts, labels : sequences of str and int
        The prompts, and their labels in the network's table.
    forgotten : int
        Number of prompts to forget, which come first and are framed.
    per_prompt : int
        Images of each.
    folder : Path
        Of the pictures.
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
        """Draw images of the pretrained model by DDIM, and save them in before.png."""
        setting = self.method.setting
        with setting.compute.autocast():
            sampler = Sampler("ddim", num_inference_steps=steps, guidance_scale=guidance_scale, batch_size=1)
            latents = sampler.draw(setting.problem.teacher, setting.problem.schedule, self.labels, setting.compute.seed)
        images = self._images(latents)
        self._save("before", images)
        return images

    def after(self, network: nn.Module, name: str = "after") -> Tensor:
        """Draw images of a network of the run, and save them as ``name``.png."""
        setting, sampler = self.method.setting, replace(self.method.sampler, batch_size=1)
        with setting.compute.autocast():
            latents = sampler.draw(network, setting.problem.schedule, self.labels, setting.compute.seed)
        images = self._images(latents)
        self._save(name, images)
        return images

    def both(self, before: Tensor, after: Tensor) -> None:
        """Save both side by side in before_after.png."""
        path, sheets = self.folder / "before_after.png", {"before": before, "after": after}
        save_side_by_side(path, sheets, self.rows, self.prompts, highlight=self.framed, names_width=PROMPT_WIDTH)

    def _save(self, name: str, images: Tensor) -> None:
        path = self.folder / f"{name}.png"
        save_grid(path, images, self.rows, self.prompts, highlight=self.framed, names_width=PROMPT_WIDTH)
