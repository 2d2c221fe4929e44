"""A class-conditional diffusion model that draws in many steps, as a diffusers pipeline.

This file is saved beside the weights. It needs torch and diffusers only, so that the model can be used without the
package that trained it.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipe(class_labels=[1, 2, 3]).images
"""

import os
import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers runs the files of all folders in one module, where a class of another file would be ambiguous.
for _name in ("OneStepPipeline", "OneStepTextPipeline", "OneStepXLPipeline"):
    globals().pop(_name, None)

SAMPLERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


class ManyStepPipeline(DiffusionPipeline):
    """Draws by DDIM (arXiv 2010.02502, eta = 0) or by ancestral sampling (DDPM, arXiv 2006.11239).

    Parameters
    ----------
    unet : UNet2DModel
        Predicts the noise, conditional on class labels.
    scheduler : DDIMScheduler or DDPMScheduler
        Has the noise levels that the U-Net was trained on.
    eval_sampler : {"ddim", "ddpm"}
        How images are drawn: with a scheduler of this kind, made from the configuration of ``scheduler``.
    num_inference_steps : int
        Steps.
    eval_guidance_scale : float
        w of eps_u + w (eps_c - eps_u); 1 is none. Others need a last label for "no condition".
    clip_sample : bool
        Whether the x_0 that is predicted at each step is clamped to [-1, 1].
    id2label : dict, optional
        From each label, as a text, to its name.

    Raises
    ------
    ValueError
        If ``eval_sampler`` is another.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDIMScheduler,
        # The defaults are for diffusers: when it loads a folder, it takes arguments without a default for modules.
        eval_sampler: str = "ddim",
        num_inference_steps: int = 50,
        eval_guidance_scale: float = 1.0,
        clip_sample: bool = True,
        id2label: dict | None = None,
    ) -> None:
        super().__init__()
        if eval_sampler not in SAMPLERS:
            raise ValueError(f"eval_sampler is {eval_sampler!r}, expected ddim or ddpm")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            eval_sampler=eval_sampler,
            num_inference_steps=num_inference_steps,
            eval_guidance_scale=eval_guidance_scale,
            clip_sample=clip_sample,
            # A mapping, because diffusers takes a list in model_index.json for a module if the folder is on the hub.
            id2label=id2label,
        )

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
        class_labels: int | str | list[int | str] | torch.Tensor,
        num_images_per_label: int = 1,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        batch_size: int = 256,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Parameters
        ----------
        class_labels : int, str, list of these or Tensor
            One label or several; a str is a name in ``id2label``.
        num_images_per_label : int
            Images of each label, one after the other.
        generator : torch.Generator, optional
            Draws the noise, first that of all images, then that of the steps.
        latents : Tensor, optional
            The initial noise itself, float, (N, C, H, W).
        num_inference_steps : int, optional
            Steps; those of the configuration by default.
        batch_size : int
            Images in a call of the network.
        output_type : {"pil", "np", "pt"}
            PIL images, an array (N, H, W, C) in [0, 1], or a tensor (N, C, H, W) in [0, 1].
        return_dict : bool
            Whether to return an ImagePipelineOutput or a tuple with the images.

        Returns
        -------
        ImagePipelineOutput or tuple
            The images.

        Raises
        ------
        ValueError, TypeError
            If a label is no integer or out of range, ``latents`` has another shape, or an option has an invalid value.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}, expected pil, np or pt")
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        last = self.scheduler.config.num_train_timesteps
        for name, value in (("num_images_per_label", num_images_per_label), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}, expected an integer of at least 1")
        if not isinstance(steps, int) or not 1 <= steps <= last:
            raise ValueError(f"num_inference_steps is {steps}, expected an integer from 1 to {last}")
        labels = torch.as_tensor(self._numbers(class_labels)).reshape(-1).cpu()
        if labels.numel() and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            raise TypeError(f"class_labels is {class_labels!r}, expected integers")
        rows = self.unet.config.num_class_embeds
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= rows:
            raise ValueError(f"class_labels is {class_labels}, expected labels from 0 to {rows - 1}")
        labels = labels.long().repeat_interleave(num_images_per_label)
        size, device = self.unet.config.sample_size, self._execution_device
        shape = (len(labels), self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        clip = {"clip_sample": self.config.clip_sample}
        sampler = SAMPLERS[self.config.eval_sampler].from_config(self.scheduler.config, **clip)
        sampler.set_timesteps(steps)
        noise = {"generator": generator} if self.config.eval_sampler == "ddpm" else {}
        images = []
        for x, part in zip(latents.split(batch_size), labels.split(batch_size), strict=True):
            x, part = x.to(device, torch.float32), part.to(device)
            for t in sampler.timesteps.tolist():
                x = sampler.step(self._eps(x, t, part), t, x, **noise).prev_sample
            images.append(x.clamp(-1, 1))
        images = (torch.cat(images) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _numbers(self, labels: int | str | list[int | str] | torch.Tensor) -> int | list[int] | torch.Tensor:
        """``labels`` with numbers for names. ValueError for a name that is not known."""
        several = [labels] if isinstance(labels, str) else labels
        known = {name: int(label) for label, name in (self.config.id2label or {}).items()}
        if not isinstance(several, (list, tuple)) or not any(isinstance(label, str) for label in several):
            return labels
        for label in several:
            if isinstance(label, str) and label not in known:
                raise ValueError(f"class_labels has {label!r}, expected one of {', '.join(known) or 'the numbers'}")
        return [known[label] if isinstance(label, str) else label for label in several]

    def _eps(self, x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        """The predicted noise, guided if the configuration says so."""
        inputs, scale = x.to(self.unet.dtype), self.config.eval_guidance_scale
        eps = self.unet(inputs, t, class_labels=labels).sample.float()
        if scale == 1:
            return eps
        null = torch.full_like(labels, self.unet.config.num_class_embeds - 1)
        without = self.unet(inputs, t, class_labels=null).sample.float()
        return without + scale * (eps - without)
