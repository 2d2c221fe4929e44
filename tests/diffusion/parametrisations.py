"""Every parametrisation that is supported, and its equations in float64, written without any code of the package."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pecker_fast.diffusion import Parametrisation
from pecker_fast.models import schedule_from_config

CONFIGS = {
    "epsilon": {"_class_name": "DDPMScheduler", "num_train_timesteps": 50, "beta_end": 0.3},
    "v_prediction": {"_class_name": "DDIMScheduler", "num_train_timesteps": 50, "beta_end": 0.3},
    "sample": {"_class_name": "PNDMScheduler", "num_train_timesteps": 50, "beta_end": 0.3},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 50, "shift": 3.0},
    "flow_prediction": {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 50,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 2.0,
    },
    "trigflow": {"_class_name": "SCMScheduler", "num_train_timesteps": 50},
    "edm": {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 50},
    "edm_v": {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 50, "prediction_type": "v_prediction"},
    "consistency": {"_class_name": "CMStochasticIterativeScheduler"},
}
for _kind in ("v_prediction", "sample"):
    CONFIGS[_kind]["prediction_type"] = _kind


def schedule_of(kind: str) -> Parametrisation:
    return schedule_from_config(CONFIGS[kind])


@dataclass(frozen=True, eq=False)
class Oracle:
    """The equations of one parametrisation at timesteps t, int (B,): all in float64.

    ``output`` below is what the network returns for the input ``inputs(x_t)`` and the time ``times``.
    """

    kind: str
    t: Tensor

    @property
    def _sigma(self) -> Tensor:
        """The level of schedules that are written in sigma."""
        t, size = self.t.double(), CONFIGS[self.kind].get("num_train_timesteps", 40)
        if self.kind == "trigflow":
            angle = (t + 1) / size * math.pi / 2
            sigma = angle.sin() / (angle.cos() + angle.sin())
        elif self.kind in ("flow", "flow_prediction"):
            shift = 3.0 if self.kind == "flow" else 2.0
            s = (t + 1) / size
            sigma = shift * s / (1 + (shift - 1) * s)
        else:
            sigma = (0.002 ** (1 / 7) + t / (size - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        return sigma.view(-1, 1, 1, 1)

    @property
    def _variance_preserving(self) -> bool:
        return self.kind in ("epsilon", "v_prediction", "sample")

    @property
    def _flows(self) -> bool:
        return self.kind in ("flow", "flow_prediction", "trigflow")

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        """a_t and b_t."""
        if self._variance_preserving:
            alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.3, 50, dtype=torch.float64), 0)[self.t].view(-1, 1, 1, 1)
            return alphas.sqrt(), (1 - alphas).sqrt()
        s = self._sigma
        return (1 - s, s) if self._flows else (torch.ones_like(s), s)

    @property
    def times(self) -> Tensor:
        if self._variance_preserving:
            return self.t.double()
        s = self._sigma.flatten()
        if self._flows:
            return s if self.kind == "trigflow" else 50 * s
        return s.log() / 4 * (1000 if self.kind == "consistency" else 1)

    def inputs(self, x_t: Tensor) -> Tensor:
        return x_t if self._variance_preserving or self._flows else x_t / (self._sigma**2 + 0.25).sqrt()

    def add_noise(self, x0: Tensor, eps: Tensor) -> Tensor:
        a, b = self.levels
        return a * x0 + b * eps

    def x0(self, x_t: Tensor, output: Tensor) -> Tensor:
        """The x_0 that the network means."""
        a, b = self.levels
        if self.kind == "epsilon":
            return (x_t - b * output) / a
        if self.kind == "v_prediction":
            return a * x_t - b * output
        if self.kind == "sample":
            return output
        if self._flows:
            return x_t - b * output
        sign = -1 if self.kind == "edm_v" else 1
        root = b**2 + 0.25
        return 0.25 / root * x_t + sign * b * 0.5 / root.sqrt() * output

    def one_step(self, x_t: Tensor, output: Tensor) -> Tensor:
        """The sample of a one-step generator."""
        if self.kind != "consistency":
            return self.x0(x_t, output)
        s, low = self._sigma, 0.002
        return 0.25 / ((s - low) ** 2 + 0.25) * x_t + (s - low) * 0.5 / (s**2 + 0.25).sqrt() * output

    def loss(self, x0: Tensor, eps: Tensor, output: Tensor) -> Tensor:
        """The loss of each sample that the network was pretrained with, (B,)."""
        x_t = self.add_noise(x0, eps)
        if self._variance_preserving:
            a, b = self.levels
            error = eps - (x_t - a * self.x0(x_t, output)) / b
        elif self._flows:
            error = eps - x0 - output
        else:
            # EDM's weight (s^2 + d^2) / (s d)^2.
            s = self._sigma
            error = (s**2 + 0.25).sqrt() / (0.5 * s) * (x0 - self.x0(x_t, output))
        return error.square().flatten(1).sum(1)
