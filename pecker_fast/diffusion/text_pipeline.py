"""A text-conditional one-step generator as a diffusers pipeline.

This file is saved beside the weights. It needs torch, diffusers and transformers only, so that the generator can be
used without the package that trained it.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipe("a photo of a lighthouse").images
"""

import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTextModel, CLIPTokenizer

# diffusers runs the files of all folders in one module, where a class of another file would be ambiguous.
for _name in ("OneStepPipeline", "ManyStepPipeline", "OneStepXLPipeline"):
    globals().pop(_name, None)


class OneStepTextPipeline(DiffusionPipeline):
    """Draws latents x_0 = (b z - b eps(b z, t_init, prompt)) / a in one evaluation of the U-Net and decodes them.

    z is standard normal, a^2 = alphas_cumprod at t_init, b^2 = 1 - a^2 (SiD-LSG, arXiv 2406.01561).

    Parameters
    ----------
    vae : AutoencoderKL
        Stable Diffusion's autoencoder.
    text_encoder : CLIPTextModel
        Stable Diffusion's text encoder.
    tokenizer : CLIPTokenizer
        Stable Diffusion's tokenizer.
    unet : UNet2DConditionModel
        The generator. It predicts the noise, v or x_0, as the scheduler's prediction_type says.
    scheduler : KarrasDiffusionSchedulers
        Any scheduler of diffusers with the noise levels that the U-Net was trained on.
    t_init : int
        Timestep at which the generator is fed noise.
    unit_noise : bool
        Whether the generator is fed z in place of b z (DMD2, arXiv 2405.14867).

    Raises
    ------
    ValueError
        If ``t_init`` is out of range, or the U-Net predicts none of the three.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        # The default is for diffusers: when it loads a folder, it takes arguments without a default for modules.
        t_init: int | None = None,
        unit_noise: bool = False,
    ) -> None:
        super().__init__()
        steps = scheduler.config.num_train_timesteps
        if not isinstance(t_init, int) or not 0 <= t_init < steps:
            raise ValueError(
                f"t_init is {t_init}, expected the timestep at which the generator is fed noise, from 0 to {steps - 1}"
            )
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"scheduler has prediction_type {kind!r}, expected epsilon, v_prediction or sample")
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(t_init=t_init, unit_noise=unit_noise)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save the pipeline and a copy of this file, without which the folder could not be loaded."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "pipeline.py"
        if not (target.exists() and target.samefile(__file__)):
            shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, *args, **kwargs)

    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Encode prompts as embeddings, (N, tokens, width). Prompts longer than the encoder allows are truncated."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        device = self._execution_device
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        return self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        batch_size: int = 8,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Parameters
        ----------
        prompt : str or list of str, optional
            One prompt or several.
        height, width : int, optional
            Pixels, multiples of the autoencoder's factor; by default the size that the U-Net was trained for.
        num_images_per_prompt : int
            Images of each prompt, one after the other.
        generator : torch.Generator or list of torch.Generator, optional
            Draws the noise.
        latents : Tensor, optional
            The noise z itself, float, (N, C, H, W).
        prompt_embeds : Tensor, optional
            Embeddings in place of prompts, (P, tokens, width).
        batch_size : int
            Images in a call of the U-Net.
        output_type : {"pil", "np", "pt", "latent"}
            PIL images, an array (N, H, W, C) in [0, 1], a tensor (N, C, H, W) in [0, 1], or latents.
        return_dict : bool
            Whether to return an ImagePipelineOutput or a tuple with the images.

        Returns
        -------
        ImagePipelineOutput or tuple
            The images.

        Raises
        ------
        TypeError
            If a prompt is not a string.
        ValueError
            If sizes or shapes do not fit, or an option has an invalid value.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}, expected pil, np, pt or latent")
        for name, value in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}, expected an integer of at least 1")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("expected exactly one of prompt and prompt_embeds")
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
                raise TypeError(f"prompt is {prompt!r}, expected a string or several")
            prompt_embeds = torch.cat(
                [self.encode_prompt(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
            )
        device = self._execution_device
        text = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        latents = self._noise(len(text), height, width, generator, latents)
        # In float64, because 1 - alphas_cumprod loses digits in float32.
        alpha = self.scheduler.alphas_cumprod.double()[self.config.t_init]
        signal, noise = alpha.sqrt().item(), (1 - alpha).sqrt().item()
        parts = []
        for z, part in zip(latents.split(batch_size), text.split(batch_size), strict=True):
            x = (1.0 if self.config.unit_noise else noise) * z.to(device, torch.float32)
            dtype = self.unet.dtype
            output = self.unet(x.to(dtype), self.config.t_init, encoder_hidden_states=part.to(dtype)).sample.float()
            kind = self.scheduler.config.get("prediction_type", "epsilon")
            if kind == "v_prediction":
                output = signal * output + noise * x
            x0 = output if kind == "sample" else (x - noise * output) / signal
            parts.append(x0 if output_type == "latent" else self._decode(x0))
        images = torch.cat(parts)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, count, height, width, generator, latents) -> torch.Tensor:
        size, factor = self.unet.config.sample_size, self.vae_scale_factor
        trained = (size, size) if isinstance(size, int) else tuple(size)
        latent_size = []
        for name, value, default in (("height", height, trained[0]), ("width", width, trained[1])):
            if value is not None and (value < factor or value % factor):
                raise ValueError(f"{name} is {value}, expected a multiple of {factor}")
            latent_size.append(default if value is None else value // factor)
        shape = (count, self.unet.config.in_channels, *latent_size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(scaled, return_dict=False)[0].float().cpu()
