"""A text-conditional one-step generator as a diffusers pipeline. This file is saved beside the weights: it needs torch,
diffusers and transformers and nothing else, so that the generator can be used without the package that trained it.

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


class OneStepTextPipeline(DiffusionPipeline):
    """Draws latents x_0 = (b z - b eps(b z, t_init, prompt)) / a in one evaluation of the U-Net, z standard normal,
    a^2 = alphas_cumprod at t_init, b^2 = 1 - a^2 (SiD-LSG, arXiv 2406.01561), and decodes them.

    Parameters
    ----------
    vae, text_encoder, tokenizer: Stable Diffusion's.
    unet: the generator; it predicts what the scheduler's prediction_type says: the noise or v.
    scheduler: any of diffusers' with the noise levels that it was trained on.
    t_init: the timestep at which it is fed noise.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        # Has a default only because diffusers takes arguments without one for modules when it loads a folder.
        t_init: int | None = None,
    ) -> None:
        super().__init__()
        steps = scheduler.config.num_train_timesteps
        if not isinstance(t_init, int) or not 0 <= t_init < steps:
            raise ValueError(
                f"t_init is {t_init}, expected the timestep at which the generator is fed noise, from 0 to {steps - 1}"
            )
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"scheduler has prediction_type {kind!r}, expected epsilon or v_prediction")
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(t_init=t_init)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As of every pipeline, and this file beside it, without which the folder would not be loadable."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "pipeline.py"
        if not (target.exists() and target.samefile(__file__)):
            shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, *args, **kwargs)

    def encode_prompt(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings of prompts, (N, tokens, width); what is beyond the encoder's length is cut off."""
        length = self.tokenizer.model_max_length
        found = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        device = self._execution_device
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = found.attention_mask.to(device) if masked else None
        return self.text_encoder(found.input_ids.to(device), attention_mask=mask)[0]

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
        """Draws images.

        Parameters
        ----------
        prompt: one or several.
        height, width: in pixels, multiples of the autoencoder's factor; what the U-Net was trained for by default.
        num_images_per_prompt: images of each, one after the other.
        generator: of the noise.
        latents: the noise z itself, float (N, C, H, W).
        prompt_embeds: embeddings in place of prompts, (P, tokens, width).
        batch_size: images at a time.
        output_type: "pil", "np" (N, H, W, C) in [0, 1], "pt" (N, C, H, W) in [0, 1], or "latent".
        return_dict: an ImagePipelineOutput, or a tuple with the images.

        Raises TypeError for prompts that are no texts, ValueError for sizes and shapes that do not fit.
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
                raise TypeError(f"prompt is {prompt!r}, expected one text or several")
            prompt_embeds = torch.cat(
                [self.encode_prompt(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
            )
        device = self._execution_device
        text = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        latents = self._noise(len(text), height, width, generator, latents)
        # In float64: 1 - alphas_cumprod loses digits in float32.
        kept = self.scheduler.alphas_cumprod.double()[self.config.t_init]
        signal, noise = kept.sqrt().item(), (1 - kept).sqrt().item()
        drawn = []
        for z, part in zip(latents.split(batch_size), text.split(batch_size), strict=True):
            x = noise * z.to(device, torch.float32)
            dtype = self.unet.dtype
            found = self.unet(x.to(dtype), self.config.t_init, encoder_hidden_states=part.to(dtype)).sample.float()
            if self.scheduler.config.get("prediction_type", "epsilon") == "v_prediction":
                found = signal * found + noise * x
            x0 = (x - noise * found) / signal
            drawn.append(x0 if output_type == "latent" else self._decode(x0))
        images = torch.cat(drawn)
        if output_type != "latent":
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, count, height, width, generator, latents) -> torch.Tensor:
        size, factor = self.unet.config.sample_size, self.vae_scale_factor
        trained = (size, size) if isinstance(size, int) else tuple(size)
        given = []
        for name, value, default in (("height", height, trained[0]), ("width", width, trained[1])):
            if value is not None and (value < factor or value % factor):
                raise ValueError(f"{name} is {value}, expected a multiple of {factor}")
            given.append(default if value is None else value // factor)
        shape = (count, self.unet.config.in_channels, *given)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        return latents

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(scaled, return_dict=False)[0].float().cpu()
