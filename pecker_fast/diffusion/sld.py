"""Safe latent diffusion (SLD, arXiv 2211.05105): guidance away from a text during sampling. No weight is changed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_batch, check_choice, check_int, check_like, check_number
from .generator import predict
from .networks import embedding_count
from .parametrisation import Parametrisation
from .sampling import ddim_scheduler, sample_in_batches
from .schedule import NoiseSchedule
from .unet import null_label

# The published configurations steer away from this text.
SAFETY_CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, "
    "brutality, cruelty"
)


@dataclass(frozen=True)
class SLDConfig:
    """How strongly sampling is steered away, and from which step.

    Parameters
    ----------
    warmup_steps : int
        Steps at the beginning in which the guidance only updates the momentum and is not applied.
    guidance_scale : float
        s_S.
    threshold : float
        lambda.
    momentum_scale : float
        s_m.
    momentum_beta : float
        beta_m, in [0, 1).

    Raises
    ------
    ValueError, TypeError
        If a value is out of range or has another type.
    """

    warmup_steps: int
    guidance_scale: float
    threshold: float
    momentum_scale: float
    momentum_beta: float

    def __post_init__(self) -> None:
        check_int("warmup_steps", self.warmup_steps, 0)
        for name in ("guidance_scale", "threshold", "momentum_scale"):
            check_number(name, getattr(self, name))
        check_number("momentum_beta", self.momentum_beta, 0, 1, open_high=True)


# As in the paper and its public code, which has s_S = 20 for "weak".
SLD_CONFIGS = {
    "weak": SLDConfig(15, 20.0, 0.0, 0.0, 0.0),
    "medium": SLDConfig(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": SLDConfig(7, 2000.0, 0.025, 0.5, 0.7),
    "max": SLDConfig(0, 5000.0, 1.0, 0.5, 0.7),
}


def sld_config(name: str) -> SLDConfig:
    """Return the published configuration ``name``. ValueError if there is none."""
    check_choice("sld", name, SLD_CONFIGS)
    return SLD_CONFIGS[name]


def sld_guidance(
    eps_null: Tensor, eps_cond: Tensor, eps_safety: Tensor, momentum: Tensor, step: int, config: SLDConfig
) -> tuple[Tensor, Tensor]:
    """Compute the guidance of one sampling step.

    With d = eps_cond - eps_safety, and mu = min(|d| s_S, 1) where d < lambda, otherwise 0,

        gamma = mu (eps_safety - eps_null) + s_m nu,    nu' = beta_m nu + (1 - beta_m) gamma,
        guidance = (eps_cond - eps_null) - gamma from step ``warmup_steps`` on, without gamma before.

    Parameters
    ----------
    eps_null : Tensor
        Prediction of the noise without a condition, (B, ...), floating.
    eps_cond : Tensor
        Prediction for the prompt, (B, ...).
    eps_safety : Tensor
        Prediction for the text to steer away from, (B, ...).
    momentum : Tensor
        nu, (B, ...); zeros at step 0.
    step : int
        Number of the sampling step, from 0.
    config : SLDConfig
        The constants.

    Returns
    -------
    guidance : Tensor
        float32, (B, ...): multiply it by the guidance scale and add ``eps_null``.
    momentum : Tensor
        nu', float32, (B, ...).

    Raises
    ------
    ValueError, TypeError
        If shapes do not match, or an argument has an invalid value or type.
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
    schedule: Parametrisation,
    labels: Tensor | Sequence[int],
    safety_label: int,
    config: SLDConfig,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    *,
    batch_size: int = 16,
    seed: int | torch.Generator | Sequence[int] = 0,
) -> Tensor:
    """Draw DDIM samples that ``sld_guidance`` steers away from a text.

    Parameters
    ----------
    network : nn.Module
        A network with a null label.
    safety_label : int
        Label of the text to steer away from.
    config : SLDConfig
        The constants of the guidance.
    schedule, labels, num_inference_steps, guidance_scale, batch_size, seed
        As in ``sample_ddim``.

    Returns
    -------
    Tensor
        As ``sample_one_step`` returns.

    Raises
    ------
    ValueError, TypeError
        If the network has no null label, or an argument has an invalid value or type.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"sampler is 'sld', but the network predicts a {schedule.predicts}: SLD is defined for the noise"
        )
    null = null_label(network)
    if null is None:
        raise ValueError("the network has no null label: SLD needs one")
    check_int("safety_label", safety_label, 0, embedding_count(network))
    check_int("num_inference_steps", num_inference_steps, 1, schedule.num_train_timesteps + 1)
    scheduler = ddim_scheduler(network, schedule)
    scheduler.set_timesteps(num_inference_steps)

    def step(x: Tensor, labels: Tensor, _: list[torch.Generator]) -> Tensor:
        levels, momentum = schedule.to(x.device), torch.zeros_like(x)
        all_labels = torch.cat([torch.full_like(labels, null), labels, torch.full_like(labels, safety_label)])
        for i, t in enumerate(scheduler.timesteps.tolist()):
            predictions = predict(network, levels, x.repeat(3, 1, 1, 1), t, all_labels)
            eps_null, eps_cond, eps_safety = predictions.chunk(3)
            guidance, momentum = sld_guidance(eps_null, eps_cond, eps_safety, momentum, i, config)
            x = scheduler.step(eps_null + guidance_scale * guidance, t, x).prev_sample
        return x

    return sample_in_batches(network, labels, step, batch_size=batch_size, seed=seed, shape=None)
