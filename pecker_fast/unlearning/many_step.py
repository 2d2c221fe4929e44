"""What the methods share whose result is a diffusion model like the teacher: it draws samples in many steps."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from ..checks import check_int, check_number
from ..diffusion import NUM_TRAIN_TIMESTEPS, NoiseSchedule, null_label, sample_ddim, sample_ddpm
from .conditions import ForgetRequest
from .protocol import Method
from .setting import Setting

SamplerName: TypeAlias = Literal["ddpm", "ddim"]
SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim}


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


def draw(
    network: nn.Module,
    schedule: NoiseSchedule,
    labels: Tensor,
    *,
    sampler: SamplerName,
    steps: int,
    guidance_scale: float,
    clip_sample: bool,
    seed: int,
    batch_size: int = 256,
) -> Tensor:
    """Images float32 (N, C, H, W) in [-1, 1] of ``labels``, on the network's device."""
    options = {"guidance_scale": guidance_scale, "clip_sample": clip_sample, "seed": seed, "batch_size": batch_size}
    return SAMPLERS[sampler](network, schedule, labels, steps, **options)


class ManyStepMethod(Method):
    """Base of the methods that go on training a diffusion model. Their options derive from ``SamplingOptions``."""

    def __init__(self, setting: Setting, options: Any) -> None:
        super().__init__(setting, options)
        problem, teacher_dtype = setting.problem, setting.placement.teacher_dtype
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

    def sampling(self) -> dict[str, Any]:
        o = self.options
        return {
            "sampler": o.eval_sampler,
            "sampling_steps": o.num_inference_steps,
            "guidance_scale": o.eval_guidance_scale,
        }

    def sample(self, network: nn.Module, labels: Tensor, seed: int, batch_size: int = 256) -> Tensor:
        o = self.options
        with self.setting.compute.autocast():
            return draw(
                network,
                self.setting.problem.schedule,
                labels,
                sampler=o.eval_sampler,
                steps=o.num_inference_steps,
                guidance_scale=o.eval_guidance_scale,
                clip_sample=o.clip_sample,
                seed=seed,
                batch_size=batch_size,
            )
