"""Safe latent diffusion (SLD, arXiv 2211.05105): guidance away from a text, at sampling time; no weight is changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_batch, check_int, check_like
from .generator import predict_eps
from .networks import embedding_count
from .sampling import ddim_scheduler, network_device, sample_in_batches
from .schedule import NoiseSchedule
from .unet import null_label

# The text that the published configurations steer away from.
SAFETY_CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, "
    "brutality, cruelty"
)


@dataclass(frozen=True)
class SLDConfig:
    """How strongly, and from when on, sampling is steered away.

    Parameters
    ----------
    warmup_steps: first steps in which the guidance is computed, for the momentum, but not applied.
    guidance_scale: s_S. threshold: lambda. momentum_scale: s_m. momentum_beta: beta_m.
    """

    warmup_steps: int
    guidance_scale: float
    threshold: float
    momentum_scale: float
    momentum_beta: float

    def __post_init__(self) -> None:
        check_int("warmup_steps", self.warmup_steps, 0)
        for name in ("guidance_scale", "threshold", "momentum_scale", "momentum_beta"):
            value, high = getattr(self, name), 1 if name == "momentum_beta" else float("inf")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < high:
                raise ValueError(f"{name} is {value!r}, expected a number of at least 0, below {high}")


# As published, and in the public code: there "weak" has s_S = 20.
SLD_CONFIGS = {
    "weak": SLDConfig(15, 20.0, 0.0, 0.0, 0.0),
    "medium": SLDConfig(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": SLDConfig(7, 2000.0, 0.025, 0.5, 0.7),
    "max": SLDConfig(0, 5000.0, 1.0, 0.5, 0.7),
}


def sld_config(name: str) -> SLDConfig:
    """The published configuration ``name``. ValueError where there is none."""
    if name not in SLD_CONFIGS:
        raise ValueError(f"sld is {name!r}, expected one of {', '.join(SLD_CONFIGS)}")
    return SLD_CONFIGS[name]


def sld_guidance(
    eps_null: Tensor, eps_cond: Tensor, eps_safety: Tensor, momentum: Tensor, step: int, config: SLDConfig
) -> tuple[Tensor, Tensor]:
    """One step: with d = eps_cond - eps_safety and, where d < lambda, mu = min(|d| s_S, 1), elsewhere 0,

        gamma = mu (eps_safety - eps_null) + s_m nu,    nu' = beta_m nu + (1 - beta_m) gamma,
        guidance = (eps_cond - eps_null) - gamma from the step ``warmup_steps`` on, without gamma before it.

    Parameters
    ----------
    eps_null, eps_cond, eps_safety: predictions of the noise without a condition, for the prompt, and for what to steer
        away from; (B, ...), floating.
    momentum: nu, (B, ...); zeros at step 0. Not changed.
    step: number of the sampling step, from 0.

    Returns
    -------
    guidance, which the guidance scale multiplies and ``eps_null`` is added to, and nu'; float32 (B, ...).
    """
    check_batch("eps_null", eps_null)
    for name, value in (("eps_cond", eps_cond), ("eps_safety", eps_safety), ("momentum", momentum)):
        check_like(name, value, "eps_null", eps_null)
    check_int("step", step, 0)
    null, cond, safety, nu = (value.float() for value in (eps_null, eps_cond, eps_safety, momentum))
    difference = cond - safety
    scale = (difference.abs() * config.guidance_scale).clamp(max=1)
    mu = torch.where(difference < config.threshold, scale, 0)
    gamma = mu * (safety - null) + config.momentum_scale * nu
    guidance = cond - null
    if step >= config.warmup_steps:
        guidance = guidance - gamma
    return guidance, config.momentum_beta * nu + (1 - config.momentum_beta) * gamma


def sample_sld(
    network: nn.Module,
    schedule: NoiseSchedule,
    labels: Tensor | Sequence[int],
    safety_label: int,
    config: SLDConfig,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    *,
    batch_size: int = 16,
    seed: int | torch.Generator | Sequence[int] = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """DDIM samples that are steered away from the label ``safety_label`` by ``sld_guidance``.

    Other arguments, result and errors are those of ``sample_ddim``; the network has to have a null label.
    """
    null = null_label(network)
    if null is None:
        raise ValueError("the network has no null label: SLD needs one")
    check_int("safety_label", safety_label, 0, embedding_count(network))
    check_int("num_inference_steps", num_inference_steps, 1, schedule.num_train_timesteps + 1)
    scheduler = ddim_scheduler(network, schedule)
    scheduler.set_timesteps(num_inference_steps)

    def step(x: Tensor, labels: Tensor, _) -> Tensor:
        momentum = torch.zeros_like(x)
        asked = torch.cat([torch.full_like(labels, null), labels, torch.full_like(labels, safety_label)])
        for i, t in enumerate(scheduler.timesteps.tolist()):
            predicted = predict_eps(network, x.repeat(3, 1, 1, 1), t, asked)
            eps_null, eps_cond, eps_safety = predicted.chunk(3)
            guidance, momentum = sld_guidance(eps_null, eps_cond, eps_safety, momentum, i, config)
            x = scheduler.step(eps_null + guidance_scale * guidance, t, x).prev_sample
        return x

    device = network_device(network, device)
    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, device=device, shape=None)
