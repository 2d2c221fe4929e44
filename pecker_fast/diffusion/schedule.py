"""Variance-preserving schedules: a_t = sqrt(alphas_cumprod_t) and b_t = sqrt(1 - alphas_cumprod_t)."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_int, check_like, check_number
from .parametrisation import Parametrisation

# T of the schedules that networks are trained with here and in the public code.
NUM_TRAIN_TIMESTEPS = 1000
# What networks of these schedules may return: the noise, v = a eps - b x_0 (arXiv 2202.00512), or x_0.
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NoiseSchedule(Parametrisation):
    """A discrete variance-preserving schedule (DDPM, arXiv 2006.11239, Eq. 4). Predictions are of the noise.

    Parameters
    ----------
    alphas_cumprod : Tensor
        (T,), any floating dtype, in (0, 1), not increasing: entry t is the share of the signal's variance that remains
        at timestep t. It is stored as float32; a_t and b_t are computed in float64 and then rounded, because
        1 - alphas_cumprod in float32 loses four digits at t = 0.
    prediction_type : {"epsilon", "v_prediction", "sample"}
        What networks return. ``prediction`` turns it into the noise.
    unit_noise : bool
        Whether networks are one-step generators that expect noise z of variance 1 in place of b z (DMD2,
        arXiv 2405.14867). They are fed x_t / b, and what they return refers to that.

    Raises
    ------
    ValueError, TypeError
        If ``alphas_cumprod`` is not such a tensor, or ``prediction_type`` is another.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon", unit_noise: bool = False) -> None:
        if not isinstance(alphas_cumprod, Tensor) or not alphas_cumprod.is_floating_point():
            raise TypeError("alphas_cumprod is not a floating tensor")
        exact = alphas_cumprod.detach().to("cpu", torch.float64)
        if exact.ndim != 1 or exact.numel() == 0:
            raise ValueError(f"alphas_cumprod has shape {tuple(exact.shape)}, expected (T,) with T >= 1")
        # Written so that NaN fails too.
        if not (bool((exact > 0).all()) and bool((exact < 1).all())):
            raise ValueError(
                "alphas_cumprod leaves (0, 1): x_0 cannot be predicted without signal (zero terminal SNR) or noise"
            )
        if not bool((exact[1:] <= exact[:-1]).all()):
            raise ValueError("alphas_cumprod increases, expected it to fall with t")
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        self.prediction_type, self.unit_noise = prediction_type, unit_noise
        a, b = exact.sqrt(), (1 - exact).sqrt()
        scheduler = {"_class_name": "DDPMScheduler"}
        super().__init__(a, b, skip=1 / a, out=-b / a, scheduler=scheduler, predicts=prediction_type)
        self._set({**self._float64, "alphas_cumprod": exact}, alphas_cumprod.device)

    @classmethod
    def linear(
        cls, num_train_timesteps: int = NUM_TRAIN_TIMESTEPS, beta_start: float = 1e-4, beta_end: float = 2e-2
    ) -> "NoiseSchedule":
        """Build DDPM's schedule: beta_t linear from ``beta_start`` to ``beta_end``, alphas_cumprod_t = prod (1 - beta).

        Raises
        ------
        ValueError, TypeError
            If an argument is out of range or has another type.
        """
        check_int("num_train_timesteps", num_train_timesteps, 1)
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            check_number(name, beta, 0, 1, open_low=True, open_high=True)
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        return cls((1 - betas).cumprod(0))

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        """Read the schedule of a diffusers scheduler.

        Parameters
        ----------
        scheduler : SchedulerMixin
            Anything with ``config`` and ``betas``.

        Raises
        ------
        ValueError
            If its networks return none of ``PREDICTION_TYPES``, or no signal is left at its last timestep.
        """
        config = scheduler.config
        kind = config.get("prediction_type", "epsilon")
        check_choice("prediction_type", kind, PREDICTION_TYPES)
        if config.get("rescale_betas_zero_snr", False):
            raise ValueError(
                "rescale_betas_zero_snr is True, expected False: x_0 cannot be predicted at its last timestep"
            )
        # The configuration is exact; the scheduler's float32 betas are rounded.
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif config.get("beta_schedule") == "linear":
            linear = cls.linear(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
            return cls(linear._exact, kind)
        else:
            betas = scheduler.betas.detach().cpu().double()
        return cls((1 - betas).cumprod(0), kind)

    def to_scheduler(self, scheduler_class: type | None = None, **options: Any) -> Any:
        """Build a scheduler of diffusers with this schedule; ``options`` are its other arguments.

        By default a ``DDPMScheduler``, to save it. It has this schedule's prediction type unless a class is given:
        samplers step with predictions, which are of the noise.
        """
        if scheduler_class is None:
            from diffusers import DDPMScheduler

            return self.to_scheduler(DDPMScheduler, prediction_type=self.prediction_type, **options)
        betas = self.betas
        # Rounded, because betas recovered from alphas_cumprod have the rounding error of a quotient.
        start, end = (float(f"{beta:.10g}") for beta in (betas[0], betas[-1]))
        size = self.num_train_timesteps
        linear = torch.linspace(start, end, size, dtype=torch.float64)
        if torch.allclose((1 - linear).cumprod(0), self._exact, rtol=0, atol=1e-12):
            options |= {"beta_schedule": "linear", "beta_start": start, "beta_end": end}
        else:
            options |= {"trained_betas": betas.tolist()}
        return scheduler_class(num_train_timesteps=size, **options)

    @property
    def alphas_cumprod(self) -> Tensor:
        """Shares of the signal's variance, float32 (T,)."""
        return self._tables["alphas_cumprod"]

    @property
    def _exact(self) -> Tensor:
        return self._float64["alphas_cumprod"]

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alphas_cumprod_t / alphas_cumprod_{t-1}, shape (T,), float64, on the CPU."""
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self._exact[:-1]])
        return 1 - self._exact / previous

    # ---- the noise: written so that networks that return it are not touched by rounding

    def returning(self, prediction_type: str | None = None, unit_noise: bool | None = None) -> "NoiseSchedule":
        kind = self.prediction_type if prediction_type is None else prediction_type
        unit = self.unit_noise if unit_noise is None else unit_noise
        if (kind, unit) == (self.prediction_type, self.unit_noise):
            return self
        return NoiseSchedule(self._exact, kind, unit).to(self.device)

    def agrees(self, other: Parametrisation) -> bool:
        return self.unit_noise == getattr(other, "unit_noise", False) and super().agrees(other)

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.float() / self.coefficients(x_t, t, "x_t")[1] if self.unit_noise else x_t

    def prediction(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon" and not self.unit_noise:
            return output.float()
        a, b = self.coefficients(x_t, t, "x_t")
        x = self.network_input(x_t, t).float()
        eps = output.float()
        if self.prediction_type == "v_prediction":
            eps = a * eps + b * x
        elif self.prediction_type == "sample":
            eps = (x - a * eps) / b
        # The noise that gives the same x_0 at x_t.
        return eps + (x_t.float() - x) / b if self.unit_noise else eps

    def target(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        return eps

    def predict_x0(self, x_t: Tensor, eps_pred: Tensor, t: int | Tensor) -> Tensor:
        """Compute the conditional mean (x_t - b_t eps_pred) / a_t (Tweedie; Eq. 1 and 2), (B, ...), float32.

        It is differentiable in ``x_t`` and ``eps_pred``.
        """
        check_like("eps_pred", eps_pred, "x_t", x_t)
        a, b = self.coefficients(x_t, t, "x_t")
        return (x_t.float() - b * eps_pred.float()) / a

    def start(self, z: Tensor, t: int | Tensor) -> Tensor:
        # As in DDIM and DDPM: b_t is nearly 1.
        return z.clone()

    def split(self, x_t: Tensor, prediction: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        return self.predict_x0(x_t, prediction, t), prediction

    def generate(self, x_init: Tensor, prediction: Tensor, t: int | Tensor) -> Tensor:
        return self.predict_x0(x_init, prediction, t)

    def relation(self, t_init: int) -> dict[str, float] | None:
        if self.prediction_type == "epsilon" and not self.unit_noise:
            return None
        a, b = (self._float64[name][t_init].item() for name in ("signal", "noise"))
        skips = {"epsilon": (1 / a, -b / a), "v_prediction": (a, -b), "sample": (0.0, 1.0)}
        skip, out = skips[self.prediction_type]
        return {"noise": 1.0 if self.unit_noise else b, "scale": 1.0, "time": t_init, "skip": skip, "out": out}

    def predict_eps(self, x_t: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """Compute the noise (x_t - a_t x0) / b_t that a prediction of x_0 implies, (B, ...), float32."""
        check_like("x0", x0, "x_t", x_t)
        a, b = self.coefficients(x_t, t, "x_t")
        return (x_t.float() - a * x0.float()) / b
