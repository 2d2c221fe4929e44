"""What a network's output means: the one object that turns it into x_0, the noise, or the target of a loss.

A parametrisation is a table of T noise levels, x_t = a_t x_0 + b_t eps, and of what the network is given and returns at
each of them. It is read from the configuration of a scheduler (``models.schedules``) and belongs to the problem
(``Problem.schedule``). Nothing else knows what a network predicts:

    scheduler_config.json --> schedule_from_config --> Parametrisation
                                                        |
      predict (generator.py)      network_input, network_time, prediction       what the network is called with
      OneStepGenerator            generate                                      one-step samples
      DistillationLosses          add_noise, target, predict_x0                 losses of psi and theta
      denoising methods, masks    add_noise, target                             losses on the network's own target
      samplers, ESD's paths       split, add_noise                              x_0 and eps of a prediction
      saving                      to_scheduler                                  the scheduler that is written beside it

``predict`` returns the *prediction*: the quantity that losses compare with ``target``. It is the noise for
variance-preserving schedules, whatever the network returns (``NoiseSchedule``), the velocity eps - x_0 for flow
matching, and the preconditioned output F for EDM and consistency models. Guidance is linear in it.
"""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_batch, check_indices, check_int, check_like, check_timesteps

if TYPE_CHECKING:
    from typing_extensions import Self


class Parametrisation:
    """Noise levels and the affine relations between x_t, a network's prediction, x_0 and the noise.

    With y the prediction at x_t: x_0 = skip_t x_t + out_t y. Everything else follows from a_t, b_t, skip_t and out_t.

    Parameters
    ----------
    signal, noise : Tensor
        a_t and b_t, floating (T,). a_t does not increase with t, b_t is above 0.
    skip, out : Tensor
        Floating (T,), out_t not 0.
    scheduler : mapping
        Configuration of the scheduler of diffusers with these levels, with its ``_class_name``.
    predicts : str
        What networks return, for messages and metadata.
    scale : Tensor, optional
        Factor of x_t in the network's input, floating (T,); 1 by default.
    times : Tensor, optional
        What the network is given as the time, floating (T,); the timestep t itself by default.
    one_step : tuple of Tensor, optional
        skip and out of one-step generators if they differ; out may be 0 there.
    one_step_at : int, optional
        The only timestep at which one-step generators are fed noise; None if any is allowed.

    Raises
    ------
    ValueError
        If the tables are not such tensors.

    Notes
    -----
    Tables are computed in float64 and rounded once. All results are float32, whatever the dtype of the arguments. A
    timestep ``t`` is an integer, or an integer tensor of shape (B,) or (), which is checked against T unless it is on a
    GPU.
    """

    def __init__(
        self,
        signal: Tensor,
        noise: Tensor,
        *,
        skip: Tensor,
        out: Tensor,
        scheduler: Mapping[str, Any],
        predicts: str,
        scale: Tensor | None = None,
        times: Tensor | None = None,
        one_step: tuple[Tensor, Tensor] | None = None,
        one_step_at: int | None = None,
    ) -> None:
        tables = {"signal": signal, "noise": noise, "skip": skip, "out": out}
        tables |= {name: table for name, table in (("scale", scale), ("times", times)) if table is not None}
        tables["one_step_skip"], tables["one_step_out"] = (skip, out) if one_step is None else one_step
        tables = {name: table.detach().to("cpu", torch.float64) for name, table in tables.items()}
        a, b, skip, out = (tables[name] for name in ("signal", "noise", "skip", "out"))
        if a.ndim != 1 or len(a) == 0 or any(table.shape != a.shape for table in tables.values()):
            raise ValueError("expected tables of one shape, (T,) with T >= 1")
        if not all(bool(table.isfinite().all()) for table in tables.values()):
            raise ValueError("a table of noise levels has entries that are not finite")
        if not (bool((b > 0).all()) and bool((out != 0).all()) and bool((a[1:] <= a[:-1]).all())):
            raise ValueError(
                "expected noise > 0 and out other than 0 at each timestep, and a signal that does not rise"
            )
        # eps = (x_t - a x_0) / b, and the y for which skip x_t + out y is the true x_0.
        tables |= {"eps_skip": (1 - a * skip) / b, "eps_out": -a * out / b}
        tables |= {"target_x0": (1 - skip * a) / out, "target_eps": -skip * b / out}
        self.predicts, self.one_step_at, self.scheduler = predicts, one_step_at, dict(scheduler)
        self._set(tables, signal.device)

    def _set(self, tables: dict[str, Tensor], device: torch.device) -> None:
        self._float64 = tables
        self._tables = {name: table.float().to(device) for name, table in tables.items()}

    # ---- levels

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self._float64["signal"].numel()

    @property
    def device(self) -> torch.device:
        return self._tables["signal"].device

    def to(self, device: torch.device | str) -> "Self":
        """Return this parametrisation on ``device``; ``self`` if it is there already."""
        probe = torch.empty(0, device=device)
        if probe.device == self.device:
            return self
        moved = copy.copy(self)
        moved._set(self._float64, probe.device)
        return moved

    def _take(self, name: str, t: int | Tensor, ndim: int) -> Tensor:
        values = self._tables[name]
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

    def _rows(self, x: Tensor, t: int | Tensor, name: str, *tables: str) -> list[Tensor]:
        """Entries of ``tables`` for the batch ``x``, which errors call ``name``, float32 (B or 1, 1, ...)."""
        check_batch(name, x)
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device}, the schedule on {self.device}: use schedule.to(device)")
        if isinstance(t, Tensor):
            check_timesteps("t", t, x.shape[0], t.device)
        return [self._take(table, t, x.ndim) for table in tables]

    def _affine(
        self, x: Tensor, y: Tensor, t: int | Tensor, tables: tuple[str, str], names: tuple[str, str] = ("x_t", "y")
    ) -> Tensor:
        check_like(names[1], y, names[0], x)
        first, second = self._rows(x, t, names[0], *tables)
        return first * x.float() + second * y.float()

    def signal(self, t: int | Tensor, ndim: int = 4) -> Tensor:
        """Return a_t, float32, (B, 1, ...) with ``ndim`` dimensions (B = 1 for an int)."""
        return self._take("signal", t, ndim)

    def noise(self, t: int | Tensor, ndim: int = 4) -> Tensor:
        """Return b_t, float32, (B, 1, ...) with ``ndim`` dimensions (B = 1 for an int)."""
        return self._take("noise", t, ndim)

    def coefficients(self, x: Tensor, t: int | Tensor, name: str = "x") -> tuple[Tensor, Tensor]:
        """Return a_t and b_t for the batch ``x``, (B, ...), which errors call ``name``.

        Raises
        ------
        ValueError
            If ``x`` is on another device, or the length of ``t`` is not B.
        """
        a, b = self._rows(x, t, name, "signal", "noise")
        return a, b

    def add_noise(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """Compute x_t = a_t x_0 + b_t eps, (B, ...), float32, from floating ``x0`` and ``eps``, (B, ...)."""
        check_like("eps", eps, "x0", x0)
        a, b = self.coefficients(x0, t, "x0")
        return a * x0.float() + b * eps.float()

    def start(self, z: Tensor, t: int | Tensor) -> Tensor:
        """The x_t at which sampling in many steps starts from standard normal ``z``: b_t z, (B, ...), float32."""
        (b,) = self._rows(z, t, "z", "noise")
        return b * z.float()

    def step(
        self, x_t: Tensor, prediction: Tensor, t: int, s: int | None, z: Tensor | None = None, clip: bool = False
    ) -> Tensor:
        """Take a step of sampling from timestep ``t`` to ``s`` < t, or to x_0 if it is None; (B, ...), float32.

        Without ``z`` it is deterministic: x_s = a_s x_0 + b_s eps with the x_0 and eps of the prediction (DDIM, arXiv
        2010.02502, eta = 0; Euler's method for flow matching and EDM). With standard normal ``z`` it is ancestral: a
        sample of q(x_s | x_t, x_0) (DDPM, arXiv 2006.11239, Eq. 6 and 7, for any a and b). ``clip`` clamps x_0 to
        [-1, 1] and takes the noise that this x_0 leaves.
        """
        x0, eps = self.split(x_t, prediction, t)
        if clip:
            x0 = x0.clamp(-1, 1)
            a, b = self.coefficients(x_t, t, "x_t")
            eps = (x_t.float() - a * x0) / b
        if s is None:
            return x0
        if z is None:
            return self.add_noise(x0, eps, s)
        a, b, a_s, b_s = (self._float64[name][i].item() for i in (t, s) for name in ("signal", "noise"))
        ratio = a / a_s
        variance = max(b**2 - (ratio * b_s) ** 2, 0.0)
        mean = (ratio * (b_s / b) ** 2) * x_t.float() + (a_s * variance / b**2) * x0
        return mean + (variance**0.5 * b_s / b) * z

    @property
    def title(self) -> str:
        """Its scheduler and what networks return, for messages."""
        return f"{self.scheduler['_class_name']}, {self.predicts}"

    def agrees(self, other: "Parametrisation") -> bool:
        """Whether networks of the two are given and return the same, up to the rounding of files."""
        if self.predicts != other.predicts or self._float64.keys() != other._float64.keys():
            return False
        pairs = ((table, other._float64[name]) for name, table in self._float64.items())
        return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)

    def returning(self, prediction_type: str | None = None, unit_noise: bool | None = None) -> "Parametrisation":
        """The same levels with networks that return something else; ``self`` if nothing is given.

        Raises
        ------
        ValueError
            If this schedule is not variance-preserving: its networks return one thing only.
        """
        if prediction_type in (None, self.predicts) and not unit_noise:
            return self
        raise ValueError(f"prediction_type is {prediction_type!r}, but networks of {self.title} return one thing only")

    # ---- around a call of the network

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network is given as the noisy image, (B, ...)."""
        if "scale" not in self._tables:
            return x_t
        (scale,) = self._rows(x_t, t, "x_t", "scale")
        return scale * x_t.float()

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given as the time: int (B,), or float32 (B,)."""
        return self._take("times", t, 1) if "times" in self._tables else t

    def prediction(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The prediction y, float32 (B, ...), from the network's ``output`` at ``x_t``."""
        return output.float()

    # ---- what a prediction says

    def target(self, x0: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
        """The y of the true x_0 and eps, with which losses compare a prediction, (B, ...), float32."""
        return self._affine(x0, eps, t, ("target_x0", "target_eps"), ("x0", "eps"))

    def predict_x0(self, x_t: Tensor, prediction: Tensor, t: int | Tensor) -> Tensor:
        """Compute the conditional mean of x_0 that a prediction implies, (B, ...), float32.

        It is differentiable in ``x_t`` and ``prediction``.
        """
        return self._affine(x_t, prediction, t, ("skip", "out"), ("x_t", "prediction"))

    def split(self, x_t: Tensor, prediction: Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
        """Compute the x_0 and the noise that a prediction implies, (B, ...), float32: a_t x_0 + b_t eps = x_t."""
        eps = self._affine(x_t, prediction, t, ("eps_skip", "eps_out"), ("x_t", "prediction"))
        return self.predict_x0(x_t, prediction, t), eps

    def generate(self, x_init: Tensor, prediction: Tensor, t: int | Tensor) -> Tensor:
        """The sample of a one-step generator that predicts ``prediction`` at ``x_init`` = b_t z, (B, ...), float32."""
        return self._affine(x_init, prediction, t, ("one_step_skip", "one_step_out"), ("x_init", "prediction"))

    def relation(self, t_init: int) -> dict[str, float] | None:
        """The numbers of one-step generators at ``t_init`` that networks return skip x + out F(scale x, time) with.

        "noise" (b), "scale", "time", "skip" and "out", for a pipeline that has no other code; None for networks that
        return the noise.
        """
        tables = {"noise": "noise", "scale": "scale", "time": "times", "skip": "one_step_skip", "out": "one_step_out"}
        defaults = {"scale": 1.0, "time": t_init}
        return {
            name: self._float64[table][t_init].item() if table in self._float64 else defaults[name]
            for name, table in tables.items()
        }

    def check_one_step(self, t_init: int) -> None:
        """Raise ValueError or TypeError unless one-step generators can be fed noise at ``t_init``."""
        check_int("t_init", t_init, 0, self.num_train_timesteps)
        if self.one_step_at is not None and t_init != self.one_step_at:
            raise ValueError(
                f"t_init is {t_init}, expected {self.one_step_at}: {self.scheduler['_class_name']} draws in one step "
                "from its last noise level"
            )

    # ---- files

    def to_scheduler(self) -> Any:
        """Build the scheduler of diffusers with these levels, to save it beside a network."""
        import diffusers

        config = {name: value for name, value in self.scheduler.items() if not name.startswith("_")}
        return getattr(diffusers, self.scheduler["_class_name"])(**config)


def flow_matching(
    sigmas: Tensor, *, time_scale: float, scheduler: Mapping[str, Any], one_step_at: int | None = None
) -> Parametrisation:
    """Build flow matching: x_t = (1 - s_t) x_0 + s_t eps, and networks return the velocity eps - x_0.

    E[x_0 | x_t] = x_t - s_t v (arXiv 2509.25127). The last level may be pure noise, s = 1.

    Parameters
    ----------
    sigmas : Tensor
        s_t, floating (T,), rising with t, in (0, 1].
    time_scale : float
        The network is given ``time_scale`` s_t as the time.
    scheduler, one_step_at
        As of ``Parametrisation``.
    """
    s = sigmas.detach().cpu().double()
    options: dict[str, Any] = {"scheduler": scheduler, "predicts": "flow velocity", "one_step_at": one_step_at}
    return Parametrisation(1 - s, s, skip=torch.ones_like(s), out=-s, times=time_scale * s, **options)


def preconditioned(
    sigmas: Tensor,
    *,
    sigma_data: float,
    time_scale: float,
    scheduler: Mapping[str, Any],
    sign: int = 1,
    boundary: float | None = None,
) -> Parametrisation:
    """Build EDM's preconditioning (arXiv 2206.00364, Table 1): x_t = x_0 + s_t eps.

    With d = sigma_data the network is given x_t / sqrt(s^2 + d^2) and log(s) / 4, and returns F with
    x_0 = d^2 / (s^2 + d^2) x_t + s d / sqrt(s^2 + d^2) F. Its loss ||F - target||^2 is EDM's loss with EDM's weights.

    Parameters
    ----------
    sigmas : Tensor
        s_t, floating (T,), rising with t, above 0.
    sigma_data : float
        d.
    time_scale : float
        The network is given ``time_scale`` log(s) as the time.
    scheduler
        As of ``Parametrisation``.
    sign : {1, -1}
        Sign of F.
    boundary : float, optional
        The smallest noise level e of a consistency model, whose one-step samples at s_{T-1} are
        d^2 / ((s - e)^2 + d^2) x_t + (s - e) d / sqrt(s^2 + d^2) F (arXiv 2303.01469, Appendix C), which is x_t at e.
    """
    s, d = sigmas.detach().cpu().double(), sigma_data
    root = (s**2 + d**2).sqrt()
    one_step, last = None, None
    if boundary is not None:
        one_step = (d**2 / ((s - boundary) ** 2 + d**2), sign * (s - boundary) * d / root)
        last = len(s) - 1
    return Parametrisation(
        torch.ones_like(s),
        s,
        skip=d**2 / root**2,
        out=sign * s * d / root,
        scale=1 / root,
        times=time_scale * s.log(),
        one_step=one_step,
        one_step_at=last,
        scheduler=scheduler,
        predicts="preconditioned x_0" if boundary is None else "consistency function",
    )
