"""Noise prediction by a conditional network, guided or not, and the one-step generator made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_batch, check_indices, check_int, check_timesteps
from .networks import embedding_count, unwrap
from .schedule import NoiseSchedule
from .unet import null_label as null_label_of


def predict_eps(
    network: nn.Module,
    x_t: Tensor,
    t: int | Tensor,
    labels: Tensor | None,
    guidance_scale: float = 1.0,
    null_label: int | Tensor | None = None,
    conditioning: Mapping[str, Any] | None = None,
) -> Tensor:
    """eps(x_t, t, c), or with guidance eps_u + guidance_scale (eps_c - eps_u) (arXiv 2207.12598; kappa of SiD-LSG).

    Parameters
    ----------
    network: a diffusers ``UNet2DModel`` with class labels, possibly wrapped or compiled. Its mode (train or eval) and
        whether gradients are recorded are the caller's affair. Input is cast to the dtype of its weights.
    x_t: (B, C, H, W), floating.
    t: an int, or integers of shape (B,) or ().
    labels: integers of shape (B,), checked against the network's embedding unless on a GPU. None only with
        ``conditioning``.
    guidance_scale: 1 calls the network once; anything else once more, for both halves in one batch of 2 B.
    null_label: the label of "no condition" for eps_u, one or one a sample, (B,); that of the network by default.
    conditioning: further keyword arguments of the network's forward (such as ``encoder_hidden_states``). Guidance
        replaces the labels only: tensors with B rows are shared by both halves.

    Returns
    -------
    float32, the shape of ``x_t``.

    Raises
    ------
    ValueError: labels out of range or of another length; guidance without labels, or for a network without null label.
    """
    check_batch("x_t", x_t)
    batch = x_t.shape[0]
    extra = dict(conditioning or {})
    times = check_timesteps("t", t, batch, x_t.device)
    if labels is not None:
        _check_labels(labels, batch, embedding_count(network))
        extra["class_labels"] = labels.to(x_t.device)
    elif not extra:
        raise ValueError("labels is None, expected one label a sample, or conditioning")
    # No second call where it could change nothing.
    if guidance_scale == 1:
        return _call(network, x_t, times, extra)
    if labels is None:
        raise ValueError(f"guidance_scale is {guidance_scale}, expected 1 where there are no labels")
    null = _null_label(network, null_label, batch)
    doubled = {
        name: torch.cat([value, value]) if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value
        for name, value in extra.items()
    }
    doubled["class_labels"][:batch] = null
    eps_null, eps_cond = _call(network, torch.cat([x_t, x_t]), torch.cat([times, times]), doubled).chunk(2)
    return eps_null + guidance_scale * (eps_cond - eps_null)


def _check_labels(labels: Tensor, batch: int, size: int | None, name: str = "labels") -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is {type(labels).__name__}, expected a tensor")
    check_indices(name, labels, size)
    if labels.shape != (batch,):
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected ({batch},), the batch's")


def _null_label(network: nn.Module, given: int | Tensor | None, batch: int) -> int | Tensor:
    if isinstance(given, Tensor):
        _check_labels(given, batch, embedding_count(network), "null_label")
        return given
    null = null_label_of(network) if given is None else given
    if null is None:
        raise ValueError("null_label is None and the network has none: guidance needs one")
    check_int("null_label", null, 0, embedding_count(network))
    return null


def _call(network: nn.Module, x: Tensor, t: Tensor, extra: dict[str, Any]) -> Tensor:
    # The property ``dtype`` of diffusers looks at every module, which takes longer than a small network's layers.
    weight = next(unwrap(network).parameters(), x)
    return network(x.to(weight.dtype), t, return_dict=False, **extra)[0].float()


@dataclass(frozen=True, eq=False)
class OneStepGenerator:
    """G_theta(z, c): the x_0 prediction of a network at x_init = b_{t_init} z, pure noise at the level of ``t_init``.

    Parameters
    ----------
    schedule: of the networks; on their device.
    t_init: timestep that is fed, from 0 to T - 1 (SiD: 440 of 1000 for DDPM, 625 for Stable Diffusion).
    """

    schedule: NoiseSchedule
    t_init: int

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(f"schedule is {type(self.schedule).__name__}, expected a NoiseSchedule")
        check_int("t_init", self.t_init, 0, self.schedule.num_train_timesteps)

    def to(self, device: torch.device | str) -> "OneStepGenerator":
        """The same generator with its schedule on ``device``."""
        return OneStepGenerator(self.schedule.to(device), self.t_init)

    def __call__(
        self,
        network: nn.Module,
        z: Tensor,
        labels: Tensor | None,
        conditioning: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """(b z - b eps_theta(b z, t_init, c)) / a, with a and b those of ``t_init``.

        Arguments: ``z`` standard normal noise, (B, C, H, W); ``labels``, ``conditioning`` and ``guidance_scale`` as in
        ``predict_eps``. Returns float32, (B, C, H, W), not clamped. The gradient flows through eps_theta only: ``z`` is
        detached.
        """
        check_batch("z", z)
        return self.through(network, z.detach(), labels, conditioning, guidance_scale)

    def through(
        self,
        network: nn.Module,
        z: Tensor,
        labels: Tensor | None,
        conditioning: Mapping[str, Any] | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The same, with the gradient of ``z`` too: for a search among latents."""
        _, b = self.schedule.coefficients(z, self.t_init, "z")
        x_init = b * z.float()
        eps = predict_eps(network, x_init, self.t_init, labels, guidance_scale, conditioning=conditioning)
        return self.schedule.predict_x0(x_init, eps, self.t_init)
