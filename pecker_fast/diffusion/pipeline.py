"""A class-conditional one-step generator as a diffusers pipeline.

This file is saved beside the weights. It needs torch and diffusers only, so that the generator can be used without the
package that trained it.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    images = pipe(class_labels=[1, 2, 3]).images
"""

import os
import shutil
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers runs the files of all folders in one module, where a class of another file would be ambiguous.
for _name in ("ManyStepPipeline", "OneStepTextPipeline", "OneStepXLPipeline"):
    globals().pop(_name, None)


class OneStepPipeline(DiffusionPipeline):
    """Draws x_0 = (b z - b eps(b z, t_init, c)) / a in one evaluation of the network.

    z is standard normal, a^2 = alphas_cumprod at t_init, b^2 = 1 - a^2 (SiD, arXiv 2404.04057; SFD, arXiv 2409.11219).
    Networks that do not return the noise draw skip x + out F(scale x, time, c) with x = b z; ``relation`` has these
    numbers.

    Parameters
    ----------
    unet : UNet2DModel
        Conditional on class labels; predicts the noise unless ``relation`` is given.
    scheduler : DDPMScheduler
        Any scheduler of diffusers that has the noise levels that the U-Net was trained on.
    t_init : int
        Timestep at which the generator is fed noise.
    id2label : dict, optional
        From each label, as a text, to its name.
    relation : dict, optional
        "noise" (b), "scale", "time", "skip" and "out" at ``t_init``, for networks that do not return the noise.

    Raises
    ------
    ValueError
        If ``t_init`` is out of range.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        # The default is for diffusers: when it loads a folder, it takes arguments without a default for modules.
        t_init: int | None = None,
        id2label: dict | None = None,
        relation: dict | None = None,
    ) -> None:
        super().__init__()
        steps = scheduler.config.num_train_timesteps
        if not isinstance(t_init, int) or not 0 <= t_init < steps:
            raise ValueError(
                f"t_init is {t_init}, expected the timestep at which the generator is fed noise, from 0 to {steps - 1}"
            )
        self.register_modules(unet=unet, scheduler=scheduler)
        # A mapping, because diffusers takes a list in model_index.json for a module if the folder is on the hub.
        self.register_to_config(t_init=t_init, id2label=id2label, relation=relation)

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
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
        generator : torch.Generator or list of torch.Generator, optional
            Draws the noise.
        latents : Tensor, optional
            The noise z itself, float, (N, C, H, W).
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
        TypeError
            If a label is not an integer.
        ValueError
            If a label is out of range or no name, ``latents`` has another shape, or an option has an invalid value.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}, expected pil, np or pt")
        for name, value in (("num_images_per_label", num_images_per_label), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}, expected an integer of at least 1")
        labels = class_labels
        if not isinstance(labels, torch.Tensor):
            labels = torch.tensor(_integers(labels, self.config.id2label), dtype=torch.int64)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"class_labels is {labels.dtype}, expected integers")
        labels = labels.reshape(-1).cpu().long().repeat_interleave(num_images_per_label)
        rows = self.unet.config.num_class_embeds
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= rows:
            raise ValueError(f"class_labels is {class_labels}, expected labels from 0 to {rows - 1}")
        size = self.unet.config.sample_size
        shape = (len(labels), self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, expected {shape}")
        relation = self.config.relation
        if relation is None:
            # In float64, because 1 - alphas_cumprod loses digits in float32.
            alpha = self.scheduler.alphas_cumprod.double()[self.config.t_init]
            signal, noise = alpha.sqrt().item(), (1 - alpha).sqrt().item()
            relation = {"noise": noise, "scale": 1.0, "time": self.config.t_init}
        # As a tensor: the U-Net takes other numbers for integers.
        time = torch.tensor(relation["time"], device=self._execution_device)
        images = []
        for z, part in zip(latents.split(batch_size), labels.split(batch_size), strict=True):
            x = relation["noise"] * z.to(self._execution_device, torch.float32)
            part = part.to(self._execution_device)
            inputs = (relation["scale"] * x).to(self.unet.dtype)
            output = self.unet(inputs, time, class_labels=part).sample.float()
            if "skip" in relation:
                x0 = relation["skip"] * x + relation["out"] * output
            else:
                x0 = (x - noise * output) / signal
            images.append(x0.clamp(-1, 1))
        images = (torch.cat(images) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _integers(labels: int | str | list[int | str], id2label: dict | None) -> list[int]:
    """``labels`` as a list of Python integers. TypeError for anything else, ValueError for a name that is not known."""
    labels = list(labels) if isinstance(labels, (list, tuple, range)) else [labels]
    known = {name: int(label) for label, name in (id2label or {}).items()}
    for i, label in enumerate(labels):
        if isinstance(label, str) and known:
            if label not in known:
                raise ValueError(f"class_labels has {label!r}, expected one of {', '.join(known)}")
            labels[i] = label = known[label]
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise TypeError(f"class_labels has {label!r}, expected integers")
    return [label.__index__() for label in labels]
