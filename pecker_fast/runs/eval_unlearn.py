"""A run as a technique of eval-unlearn, the benchmark of unlearning in text-to-image models.

pyproject.toml names it in the group of entry points that eval-unlearn (before, eval-learn) reads. Its own technique
``free_run`` loads pipelines of diffusers alone, which do not draw in one step as the results of this package do.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from .arguments import device_of
from .prompts.sampling import PromptSampler, SamplerOptions, read_model

if TYPE_CHECKING:
    from PIL.Image import Image


class PeckerFastTechnique:
    """Draws images of prompts with a run, or with any model that ``evaluate-concept`` reads.

    The arguments are the keys of "config" in eval-unlearn's file.

    Parameters
    ----------
    model_id : str
        Folder of a run or of a model, or its name on the Hugging Face hub.
    base : str, optional
        Folder of the Stable Diffusion that the other parts come from, if the model is only a U-Net.
    device : str, optional
        cpu, cuda, cuda:1, ...; a GPU if there is one by default.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the U-Net; "auto": bfloat16 on a GPU, otherwise float32.
    sampler : {"auto", "one_step", "ddim"}
        "auto": in one step for a one-step generator, otherwise DDIM.
    num_inference_steps, guidance_scale
        Of DDIM.
    batch_size : int
        Images in a call of the network.
    erase_concept : str, optional
        What was forgotten. Only eval-unlearn reads it: its metric "err" asks for "nudity".

    Raises
    ------
    ValueError
        If there is no such model, or an option is wrong.
    """

    def __init__(
        self,
        *,
        model_id: str,
        base: str | None = None,
        device: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        sampler: Literal["auto", "one_step", "ddim"] = "auto",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        batch_size: int = 8,
        erase_concept: str | None = None,
    ) -> None:
        self.erase_concept = erase_concept
        options = SamplerOptions(sampler, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        model = read_model(model_id, base)
        self.sampler = PromptSampler(model, options, (), device_of(device), dtype, batch_size)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **_options: Any) -> "list[Image]":
        """Draw an image of each prompt; image i has the seed ``seed`` + i, or a random one if it is None."""
        from PIL import Image

        start = int(torch.randint(2**31, ())) if seed is None else seed
        items = torch.tensor([(i, start + i) for i in range(len(prompts))]).reshape(-1, 2)
        images: list[Image.Image] = []
        draw = self.sampler.drawing_anew(prompts)
        for part in items.split(self.sampler.batch_size) if len(items) else ():
            pixels = draw(part, 0)
            images += [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in pixels]
        return images
