"""The noise schedule: x_t = a_t x_0 + b_t eps with a_t = sqrt(alphas_cumprod_t), b_t = sqrt(1 - alphas_cumprod_t)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_batch, check_indices, check_int, check_like, check_number, check_timesteps

# T of the schedules that networks are trained with here and in the public code.
NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A discrete variance-preserving schedule (DDPM, arXiv 2006.11239, Eq. 4).

    Parameters
    ----------
    alphas_cumprod : Tensor
        (T,), any floating dtype, in (0, 1), not increasing: entry t is the share of the signal's variance that remains
        at timestep t. It is stored as float32; a_t and b_t are computed in float64 and then rounded, because
        1 - alphas_cumprod in float32 loses four digits at t = 0.

    Raises
    ------
    ValueError, TypeError
        If ``alphas_cumprod`` is not such a tensor.

    Notes
    -----
    All results are float32, whatever the dtype of the arguments: outputs of a network under autocast are upcast first.
    A timestep ``t`` is an integer, or an integer tensor of shape (B,) or (), which is checked against T unless it is on
    a GPU.
    """

    alphas_cumprod: Tensor
    _exact: Tensor = field(init=False, repr=False)
    _signal: Tensor = field(init=False, repr=False)
    _noise: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = self.alphas_cumprod
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError("alphas_cumprod is not a floating tensor")
        exact = values.detach().to("cpu", torch.float64)
        if exact.ndim != 1 or exact.numel() == 0:
            raise ValueError(f"alphas_cumprod has shape {tuple(exact.shape)}, expected (T,) with T >= 1")
        # Written so that NaN fails too.
        if not (bool((exact > 0).all()) and bool((exact < 1).all())):
            raise ValueError(
                "alphas_cumprod leaves (0, 1): x_0 cannot be predicted without signal (zero terminal SNR) or noise"
            )
        if not bool((exact[1:] <= exact[:-1]).all()):
            raise ValueError("alphas_cumprod increases, expected it to fall with t")
        self._place(exact, values.device)

    def _place(self, exact: Tensor, device: torch.device) -> None:
        values = {"alphas_cumprod": exact, "_signal": exact.sqrt(), "_noise": (1 - exact).sqrt()}
        for name, value in values.items():
            object.__setattr__(self, name, value.float().to(device))
        object.__setattr__(self, "_exact", exact)

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
    def from_scheduler(cls, scheduler: Any, prediction_types: Sequence[str] = ("epsilon",)) -> "NoiseSchedule":
        """Read the schedule of a diffusers scheduler.

        Parameters
        ----------
        scheduler : SchedulerMixin
            Anything with ``config`` and ``betas``.
        prediction_types : sequence of str
            What its networks may predict.

        Raises
        ------
        ValueError
            If its networks predict something else, or no signal is left at its last timestep.
        """
        config = scheduler.config
        kind = config.get("prediction_type", "epsilon")
        if kind not in prediction_types:
            expected = ", ".join(f'"{name}"' for name in prediction_types)
            raise ValueError(f"scheduler has prediction_type {kind!r}, expected {expected}")
        if config.get("rescale_betas_zero_snr", False):
            raise ValueError("scheduler has rescale_betas_zero_snr: x_0 cannot be predicted at its last timestep")
        # The configuration is exact; the scheduler's float32 betas are rounded.
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif config.get("beta_schedule") == "linear":
            return cls.linear(config["num_train_timesteps"], config["beta_start"], config["beta_end"])
        else:
            betas = scheduler.betas.detach().cpu().double()
        return cls((1 - betas).cumprod(0))

    def to_scheduler(self, scheduler_class: type, **options: Any) -> Any:
        """Build a scheduler of diffusers with this schedule; ``options`` are its other arguments."""
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
    def num_train_timesteps(self) -> int:
        """T."""
        return self._exact.numel()

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alphas_cumprod_t / alphas_cumprod_{t-1}, shape (T,), float64, on the CPU."""
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self._exact[:-1]])
        return 1 - self._exact / previous

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return this schedule on ``device``; ``self`` if it is there already."""
        probe = torch.empty(0, device=device)
        if probe.device == self.device:
            return self
        moved = object.__new__(type(self))
        moved._place(self._exact, probe.device)
        return moved

    def _take(self, values: Tensor, t: int | Tensor, ndim: int) -> Tensor:
        if isinstance(t, Tensor):
            check_indices("t", t, self.num_train_timesteps)
            if t.ndim > 1:
                raise ValueError(f"t has shape {tuple(t.shape)}, expected () or (B,)")
            if t.device.type != "cpu" and t.device != self.device:
                raise ValueError(f"t is on {t.device}, the schedule on {self.device}: use schedule.to(device)")
            # As int64, because torch takes an index of uint8 for a mask.
            values = values[t.reshape(-1).long()]
        else:
            check_int("t", t, 0, self.num_train_timesteps)
            values = values[t : t + 1]
        return values.reshape(-1, *[1] * (ndim - 1))

    def signal(self, t: int | Tensor, ndim: int = 4) -> Tensor:
        """Return a_t, float32, (B, 1, ...) with ``ndim`` dimensions (B = 1 for an int)."""
        return self._take(self._signal, t, ndim)

    def noise(self, t: int | Tensor, ndim: int = 4) -> Tensor:
        """Return b_t, float32, (B, 1, ...) with ``ndim`` dimensions (B = 1 for an int)."""
        return self._take(self._noise, t, ndim)

    def coefficients(self, x: Tensor, t: int | Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
        """Return a_t and b_t for the batch ``x``, (B, ...), which errors call ``name``.

        Raises
        ------
        ValueError
            If ``x`` is on another device, or the length of ``t`` is not B.
        """
        check_batch(name, x)
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device}, the schedule on {self.device}: use schedule.to(device)")
        if isinstance(t, Tensor):
            check_timesteps("t", t, x.shape[0], t.device)
        return self.signal(t, x.ndim), self.noise(t, x.ndim)

    def add_noise(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Compute x_t = a_t x_0 + b_t eps, (B, ...), float32, from floating ``x0`` and ``eps``, (B, ...)."""
        check_like("eps", eps, "x0", x0)
        a, b = self.coefficients(x0, t, "x0")
        return a * x0.float() + b * eps.float()

    def predict_x0(self, x_t: Tensor, eps_pred: Tensor, t: int | Tensor) -> Tensor:
        """Compute the conditional mean (x_t - b_t eps_pred) / a_t (Tweedie; Eq. 1 and 2), (B, ...), float32.

        It is differentiable in ``x_t`` and ``eps_pred``.
        """
        check_like("eps_pred", eps_pred, "x_t", x_t)
        a, b = self.coefficients(x_t, t, "x_t")
        return (x_t.float() - b * eps_pred.float()) / a

    def predict_eps(self, x_t: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        """Compute the noise (x_t - a_t x0) / b_t that a prediction of x_0 implies, (B, ...), float32."""
        check_like("x0", x0, "x_t", x_t)
        a, b = self.coefficients(x_t, t, "x_t")
        return (x_t.float() - a * x0.float()) / b
