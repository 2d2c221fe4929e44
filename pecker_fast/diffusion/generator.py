"""Predictions of a conditional network, with or without guidance, and the one-step generator made of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_batch, check_indices, check_int, check_timesteps
from .networks import embedding_count, unwrap
from .parametrisation import Parametrisation
from .unet import null_label as null_label_of


def predict(
    network: nn.Module,
    schedule: Parametrisation,
    x_t: Tensor,
    t: int | Tensor,
    labels: Tensor,
    guidance_scale: float = 1.0,
    null_label: int | Tensor | None = None,
) -> Tensor:
    """Compute the prediction y(x_t, t, c), or with guidance y_u + guidance_scale (y_c - y_u).

    What it is of is the schedule's to say: the noise for variance-preserving ones (``Parametrisation``). The guidance
    is classifier-free (arXiv 2207.12598; kappa of SiD-LSG).

    Parameters
    ----------
    network : nn.Module
        A diffusers ``UNet2DModel`` with class labels, possibly wrapped or compiled. The caller chooses its mode (train
        or eval) and whether gradients are recorded. Its input is cast to the dtype of its weights.
    schedule : Parametrisation
        What the network is given and returns, on the device of ``x_t``.
    x_t : Tensor
        Noisy images, floating, (B, C, H, W).
    t : int or Tensor
        Timesteps: an integer, or integers of shape (B,) or ().
    labels : Tensor
        Integers, (B,). They are checked against the size of the network's embedding unless they are on a GPU.
    guidance_scale : float
        With 1 the network is called once on B samples, otherwise once on 2 B, for both predictions.
    null_label : int or Tensor, optional
        Label of "no condition" for y_u, or one for each sample, (B,); by default the network's own.

    Returns
    -------
    Tensor
        float32, the shape of ``x_t``.

    Raises
    ------
    ValueError
        If labels are out of range or their number is not B, or a network without a null label is guided.
    TypeError
        If an argument has another type.
    """
    check_batch("x_t", x_t)
    batch = x_t.shape[0]
    times = check_timesteps("t", t, batch, x_t.device)
    _check_labels(labels, batch, embedding_count(network))
    labels = labels.to(x_t.device)
    # At scale 1 the second prediction has no weight.
    if guidance_scale == 1:
        return _call(network, schedule, x_t, times, labels)
    doubled = torch.cat([labels, labels])
    doubled[:batch] = _null_label(network, null_label, batch)
    both = _call(network, schedule, torch.cat([x_t, x_t]), torch.cat([times, times]), doubled)
    null, conditional = both.chunk(2)
    return null + guidance_scale * (conditional - null)


def _check_labels(labels: Tensor, batch: int, size: int | None, name: str = "labels") -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is {type(labels).__name__}, expected a tensor")
    check_indices(name, labels, size)
    if labels.shape != (batch,):
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected ({batch},), the batch's")


def _null_label(network: nn.Module, label: int | Tensor | None, batch: int) -> int | Tensor:
    if isinstance(label, Tensor):
        _check_labels(label, batch, embedding_count(network), "null_label")
        return label
    label = null_label_of(network) if label is None else label
    if label is None:
        raise ValueError("null_label is None and the network has none: guidance needs one")
    check_int("null_label", label, 0, embedding_count(network))
    return label


def _call(network: nn.Module, schedule: Parametrisation, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    # The ``dtype`` property of diffusers looks at every module, which takes longer than a small network's layers.
    weight = next(unwrap(network).parameters(), x)
    # A network of a variance-preserving schedule may return something else than its teacher; predictions are alike.
    schedule = getattr(unwrap(network), "schedule", schedule)
    inputs, times = schedule.network_input(x, t).to(weight.dtype), schedule.network_time(t)
    (output,) = network(inputs, times, class_labels=labels, return_dict=False)
    return schedule.prediction(x, output, t)


@dataclass(frozen=True, eq=False)
class OneStepGenerator:
    """G_theta(z, c): the x_0 that a network predicts at x_init = b_{t_init} z, pure noise at the level of ``t_init``.

    Parameters
    ----------
    schedule : Parametrisation
        The networks' schedule, on their device.
    t_init : int
        Timestep at which the network is fed noise, from 0 to T - 1 (SiD: 440 of 1000 for DDPM, 625 for Stable
        Diffusion).

    Raises
    ------
    ValueError, TypeError
        If one-step generators are not fed noise at ``t_init``, or an argument has another type.
    """

    schedule: Parametrisation
    t_init: int

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Parametrisation):
            raise TypeError(f"schedule is {type(self.schedule).__name__}, expected a Parametrisation")
        self.schedule.check_one_step(self.t_init)

    def to(self, device: torch.device | str) -> "OneStepGenerator":
        """The same generator with its schedule on ``device``."""
        return OneStepGenerator(self.schedule.to(device), self.t_init)

    def __call__(self, network: nn.Module, z: Tensor, labels: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Generate the x_0 that theta predicts at b z and ``t_init``; of the noise, (b z - b eps_theta(b z, c)) / a.

        The gradient flows through theta's prediction only: ``z`` is detached.

        Parameters
        ----------
        network : nn.Module
            theta.
        z : Tensor
            Standard normal noise, (B, C, H, W).
        labels, guidance_scale
            As in ``predict``.

        Returns
        -------
        Tensor
            float32, (B, C, H, W), not clamped.
        """
        check_batch("z", z)
        return self.through(network, z.detach(), labels, guidance_scale)

    def through(self, network: nn.Module, z: Tensor, labels: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Generate the same with the gradient of ``z`` as well, to search for latents."""
        _, b = self.schedule.coefficients(z, self.t_init, "z")
        x_init = b * z.float()
        prediction = predict(network, self.schedule, x_init, self.t_init, labels, guidance_scale)
        return self.schedule.generate(x_init, prediction, self.t_init)
