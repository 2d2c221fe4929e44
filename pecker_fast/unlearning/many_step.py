"""What the methods share whose result is a diffusion model like the teacher: it draws samples in many steps."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from ..checks import check_int, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS, Sampler, null_label
from .conditions import ForgetRequest
from .protocol import Method
from .setting import Setting

SamplerName: TypeAlias = Literal["ddpm", "ddim"]


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn. The defaults are the published protocol: ancestral sampling over all steps, no clipping."""

    eval_sampler: SamplerName = "ddpm"
    """Sampler of the evaluation: ancestral (DDPM, posterior variance) or deterministic (DDIM)."""
    num_inference_steps: int = NUM_TRAIN_TIMESTEPS
    """Steps of this sampler."""
    eval_guidance_scale: float = 1.0
    """Guidance of this sampler, eps_u + scale (eps_c - eps_u): 1 is none; the public code's cond_scale is this minus
    1."""
    clip_sample: bool = False
    """Clip the x_0 that is predicted at every step to [-1, 1], here and in the teacher's samples."""

    def sampler(self) -> Sampler:
        """The sampler that these options describe."""
        return Sampler(
            self.eval_sampler,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.eval_guidance_scale,
            clip_sample=self.clip_sample,
        )

    def check_sampling(self, num_train_timesteps: int) -> None:
        """Check these options. ValueError or TypeError, naming the option, if one is out of range."""
        check_int("num_inference_steps", self.num_inference_steps, 1, num_train_timesteps + 1)
        check_number("eval_guidance_scale", self.eval_guidance_scale)


def check_guidance(network: nn.Module, name: str, scale: float) -> None:
    """ValueError for guidance of a network that has no label for "no condition"."""
    if scale != 1 and null_label(network) is None:
        raise ValueError(
            f'{name} is {scale:g}, but the pretrained network has no label for "no condition": expected 1, no guidance'
        )


class ManyStepMethod(Method):
    """Base of the methods that go on training a diffusion model. Their options derive from ``SamplingOptions``."""

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        problem, teacher_dtype = setting.problem, setting.placement.teacher_dtype
        if problem.schedule.one_step_at is not None:
            raise ValueError(
                f"method is {self.name!r}, which trains a diffusion model, but the pretrained network draws in one "
                f"step ({problem.schedule.title}): expected a method of one-step generators, such as patch"
            )
        options.check(problem.schedule.num_train_timesteps)
        if not isinstance(problem.request, ForgetRequest) and not self.forgets_prompts:
            raise ValueError(f"{self.name} forgets classes of a class-conditional network, not prompts")
        starts = {"initial_generator": problem.initial_generator, "initial_score": problem.initial_score}
        if not self.forgets_prompts:
            starts["teacher_dtype"] = teacher_dtype
        for name, value in starts.items():
            if value is not None:
                raise ValueError(f"{name} is given, but {self.name} starts from the pretrained network: expected none")
        check_guidance(problem.teacher, "eval_guidance_scale", options.eval_guidance_scale)
        if self.needs_data(options) and problem.training_images is None:
            raise ValueError(f"{self.name} needs images of the training set, and there are none (training_images)")

    @property
    def sampler(self) -> Sampler:
        return self.options.sampler()
