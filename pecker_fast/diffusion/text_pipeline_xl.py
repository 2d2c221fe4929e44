"""A one-step generator of Stable Diffusion XL as a diffusers pipeline.

This file is saved beside the weights. It needs torch, diffusers and transformers only, so that the generator can be
used without the package that trained it.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipe("a photo of a lighthouse").images
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# diffusers runs the files of all folders in one module, where a class of another file would be ambiguous.
for _name in ("OneStepPipeline", "ManyStepPipeline", "OneStepTextPipeline"):
    globals().pop(_name, None)

KINDS = ("epsilon", "v_prediction", "sample")


class OneStepXLPipeline(StableDiffusionXLPipeline):
    """Draws latents in one evaluation of the U-Net at ``t_init`` and decodes them; otherwise diffusers' own pipeline.

    z is standard normal, a^2 = alphas_cumprod at t_init, b^2 = 1 - a^2. The U-Net is fed x = b z and predicts eps, v or
    x_0 = (x - b eps) / a.

    Parameters
    ----------
    vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, force_zeros_for_empty_prompt
        As of ``StableDiffusionXLPipeline``.
    scheduler : KarrasDiffusionSchedulers
        Any scheduler of diffusers with the noise levels that the U-Net was trained on. Its prediction_type says what
        the U-Net predicts.
    image_encoder, feature_extractor
        None: nothing else is supported.
    t_init : int
        Timestep at which the generator is fed noise.
    unit_noise : bool
        Whether the generator is fed z in place of b z (DMD2, arXiv 2405.14867).

    Raises
    ------
    ValueError
        If ``t_init`` is out of range, or the U-Net predicts none of the three.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        # The default is for diffusers: when it loads a folder, it takes arguments without a default for modules.
        t_init: int | None = None,
        unit_noise: bool = False,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
        steps = scheduler.config.num_train_timesteps
        if not isinstance(t_init, int) or not 0 <= t_init < steps:
            raise ValueError(
                f"t_init is {t_init}, expected the timestep at which the generator is fed noise, from 0 to {steps - 1}"
            )
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in KINDS:
            raise ValueError(f"scheduler has prediction_type {kind!r}, expected one of {', '.join(KINDS)}")
        self.register_to_config(t_init=t_init, unit_noise=unit_noise)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save the pipeline and a copy of this file, without which the folder could not be loaded."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "pipeline.py"
        if not (target.exists() and target.samefile(__file__)):
            shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, *args, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        batch_size: int = 4,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Parameters
        ----------
        prompt : str or list of str
            One prompt or several.
        height, width : int, optional
            Pixels, multiples of the autoencoder's factor; by default the size that the U-Net was trained for.
        num_images_per_prompt : int
            Images of each prompt, one after the other.
        generator : torch.Generator or list of torch.Generator, optional
            Draws the noise.
        latents : Tensor, optional
            Standard normal noise, (images, C, h, w), in place of the generator's.
        batch_size : int
            Images in a call of the U-Net.
        output_type : {"pil", "np", "pt", "latent"}
            "pt": float32 in [0, 1], (images, 3, H, W); "latent": latents, not decoded.
        return_dict : bool
            Whether to return an ``ImagePipelineOutput``, otherwise a tuple of one.

        Returns
        -------
        ImagePipelineOutput or tuple

        Raises
        ------
        ValueError, TypeError
            If an argument is out of range or has another type.
        """
        for name, value in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}, expected an integer of at least 1")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompt is {prompt!r}, expected a string or several")
        default = self.default_sample_size * self.vae_scale_factor
        height, width = (default if size is None else size for size in (height, width))
        for name, size in (("height", height), ("width", width)):
            if size < self.vae_scale_factor or size % self.vae_scale_factor:
                raise ValueError(f"{name} is {size}, expected a multiple of {self.vae_scale_factor}")
        device, dtype = self._execution_device, self.unet.dtype
        text, _, pooled, _ = self.encode_prompt(
            list(prompts),
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            do_classifier_free_guidance=False,
        )
        shape = (
            len(text),
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        # In float64, because 1 - alphas_cumprod loses digits in float32.
        alpha = self.scheduler.alphas_cumprod.double()[self.config.t_init]
        signal, noise = alpha.sqrt().item(), (1 - alpha).sqrt().item()
        kind = self.scheduler.config.get("prediction_type", "epsilon")
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=device)
        results = []
        for start in range(0, len(text), batch_size):
            part = slice(start, start + batch_size)
            x = (1.0 if self.config.unit_noise else noise) * latents[part].to(device, torch.float32)
            added = {"text_embeds": pooled[part].to(dtype), "time_ids": sizes.expand(len(x), -1)}
            output = self.unet(
                x.to(dtype),
                self.config.t_init,
                encoder_hidden_states=text[part].to(dtype),
                added_cond_kwargs=added,
            ).sample.float()
            if kind == "v_prediction":
                output = signal * output + noise * x
            x0 = output if kind == "sample" else (x - noise * output) / signal
            results.append(x0 if output_type == "latent" else self._decode(x0))
        images = torch.cat(results)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        before = self.vae.dtype
        # In float16 the activations of SDXL's own autoencoder overflow; its configuration says so.
        upcast = before == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(dtype=torch.float32)
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        images = self.vae.decode(scaled, return_dict=False)[0].float().cpu()
        if upcast:
            self.vae.to(dtype=before)
        return images
