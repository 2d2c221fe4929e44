"""What the methods share whose result is a diffusion model like the teacher: it draws in many steps."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..checks import check_choice, check_int, check_number
from ..diffusion import Sampler, null_label
from .protocol import Method
from .setting import ForgetRequest, Setting

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn. The defaults are the published protocol: ancestral sampling over all steps, nothing cut."""

    eval_sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Sampler of the evaluation: ancestral (DDPM, posterior variance) or deterministic (DDIM)."""
    num_inference_steps: int = 1000
    """Its steps."""
    eval_guidance_scale: float = 1.0
    """Its guidance, eps_u + scale (eps_c - eps_u): 1 is none; the public code's cond_scale is this less 1."""
    clip_sample: bool = False
    """Cut the x_0 that is predicted at every step to [-1, 1], here and where the teacher draws."""

    def check_sampling(self, num_train_timesteps: int) -> None:
        """Raises ValueError or TypeError, naming the option, where one is out of range."""
        check_choice("eval_sampler", self.eval_sampler, SAMPLERS)
        check_int("num_inference_steps", self.num_inference_steps, 1, num_train_timesteps + 1)
        check_number("eval_guidance_scale", self.eval_guidance_scale)


def check_guidance(network: nn.Module, name: str, scale: float) -> None:
    """Raises ValueError for guidance of a network that has no label for "no condition"."""
    if scale != 1 and null_label(network) is None:
        raise ValueError(
            f'{name} is {scale:g}, but the pretrained network has no label for "no condition": expected 1, no guidance'
        )


class ManyStepMethod(Method):
    """Base of the methods that train a diffusion model on. Its options have those of SamplingOptions."""

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        options.check(setting.schedule.num_train_timesteps)
        if not isinstance(setting.request, ForgetRequest) and not self.forgets_prompts:
            raise ValueError(f"{self.name} forgets classes of a class-conditional network, not prompts")
        for name in ("initial_generator", "initial_score", "teacher_dtype"):
            if getattr(setting, name) is not None and not (name == "teacher_dtype" and self.forgets_prompts):
                raise ValueError(f"{name} is given, but {self.name} starts from the pretrained network: expected none")
        if setting.weights_dtype != torch.float32:
            raise ValueError(f"weights_dtype is {setting.weights_dtype}, but {self.name} trains float32 weights")
        check_guidance(setting.teacher, "eval_guidance_scale", options.eval_guidance_scale)
        if self.needs_data(options) and setting.training_images is None:
            raise ValueError(f"{self.name} needs images of the training set, and there are none (training_images)")

    @property
    def sampler(self) -> Sampler:
        o = self.options
        return Sampler(
            o.eval_sampler,
            num_inference_steps=o.num_inference_steps,
            guidance_scale=o.eval_guidance_scale,
            clip_sample=o.clip_sample,
        )
