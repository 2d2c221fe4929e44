"""Stable Diffusion XL: two text encoders, and a U-Net that is also told a pooled embedding and a size."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion.conditioning import TIME_IDS, Conditioning
from ..diffusion.text import TEXT_TIME, TextConditioned, embed_prompts_xl, encode_prompts_xl
from .stable_diffusion import Prediction, StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """An SDXL in a folder, as ``StableDiffusionXLPipeline`` and the one-step pipeline save it.

    Images are drawn as those pipelines draw them by default: original and target size are the size of the image, and
    nothing is cropped away. The empty prompt, which stands for "no condition", is all zeros if the pipeline says so
    (``force_zeros_for_empty_prompt``), as it does for the published models.

    Parameters
    ----------
    folder : str or os.PathLike
        Has unet/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/ and scheduler/.

    Raises
    ------
    ValueError
        If a part is missing, the U-Net is another model's, or its scheduler cannot be used.
    """

    name = "Stable Diffusion XL"
    encoders: ClassVar = (
        ("tokenizer", "text_encoder", "CLIPTextModel"),
        ("tokenizer_2", "text_encoder_2", "CLIPTextModelWithProjection"),
    )

    def _check(self) -> None:
        super()._check()
        if self.config("unet").get("addition_embed_type") != TEXT_TIME:
            raise ValueError(f"{self} has two text encoders, but its U-Net takes no pooled embedding: it is no SDXL")
        if self.config("vae").get("latents_mean") is not None:
            raise ValueError(f"{self} has a VAE with latents_mean, which is not supported: expected SDXL's")

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether the empty prompt is embedded as zeros."""
        return bool(self.index().get("force_zeros_for_empty_prompt", True))

    def text_encoder_hashes(self) -> list[str]:
        return [*super().text_encoder_hashes(), f"zeros for empty prompt: {self.zeros_for_empty_prompt}"]

    def encode(
        self, prompts: Sequence[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[Conditioning, list[str]]:
        # One encoder at a time: the second has 695 million parameters.
        pairs = (
            (self.load_tokenizer(tokenizer), self.load_text_encoder(encoder).to(device))
            for tokenizer, encoder, _ in self.encoders
        )
        conditioning, truncated = encode_prompts_xl(pairs, prompts)
        return self._emptied(conditioning, prompts).to(dtype=dtype), truncated

    def embed(self, encoders: Sequence[tuple[Any, nn.Module]], prompts: Sequence[str]) -> Conditioning:
        return self._emptied(embed_prompts_xl(encoders, prompts), prompts)

    def _emptied(self, conditioning: Conditioning, prompts: Sequence[str]) -> Conditioning:
        """Set the conditioning of the empty prompt to zeros, in place, if the pipeline says so."""
        if self.zeros_for_empty_prompt:
            empty = [row for row, text in enumerate(prompts) if text == ""]
            for _, value in conditioning.items():
                value[empty] = 0
        return conditioning

    def network(
        self,
        conditioning: Conditioning | Tensor,
        resolution: int | None = None,
        unet: nn.Module | None = None,
        prediction: Prediction | None = None,
    ) -> TextConditioned:
        size = self.latent_size(resolution) * self.vae_scale_factor
        conditioning = Conditioning.of(conditioning)
        # Integers, which low precision does not round: (height, width) of the original, crop, (height, width).
        sizes = torch.tensor([size, size, 0, 0, size, size]).expand(len(conditioning), -1)
        return super().network(conditioning | {TIME_IDS: sizes}, resolution, unet, prediction)

    def build_pipeline(self, unet: nn.Module, t_init: int | None, prediction: Prediction) -> Any:
        from diffusers import StableDiffusionXLPipeline

        from ..diffusion.text_pipeline_xl import OneStepXLPipeline

        parts = {**self.load_other_parts(), "unet": unet, "scheduler": self.scheduler_for(t_init, prediction)}
        options = {"force_zeros_for_empty_prompt": self.zeros_for_empty_prompt}
        if t_init is None:
            return StableDiffusionXLPipeline(**parts, **options, add_watermarker=False)
        return OneStepXLPipeline(**parts, **options, t_init=t_init, unit_noise=prediction.unit_noise)

    def scheduler_for(self, t_init: int | None, prediction: Prediction) -> Any:
        """The scheduler to save beside another U-Net; arguments as of ``build_pipeline``.

        If diffusers has one that draws in one step as the generator does, it is that one, so that
        ``StableDiffusionXLPipeline`` draws the same: Euler from the last timestep, LCM for noise of variance 1.
        """
        from diffusers import EulerDiscreteScheduler, LCMScheduler

        scheduler = super().scheduler_for(t_init, prediction)
        if t_init is not None and prediction.unit_noise:
            return LCMScheduler.from_config(scheduler.config)
        if t_init == self.schedule.num_train_timesteps - 1:
            return EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")
        return scheduler
