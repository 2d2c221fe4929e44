"""From the configuration of a scheduler of diffusers to the parametrisation of its network.

``READERS`` is the table of what is understood. A configuration of another class, or with a value that is not listed, is
refused. Keys that are missing have the defaults of the class in diffusers, never of another one.
"""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks import check_choice, check_int, check_number
from ..diffusion import PREDICTION_TYPES, NoiseSchedule, Parametrisation, flow_matching, preconditioned
from .offline import read_config

SCHEDULER_CONFIG = "scheduler_config.json"
Config = Mapping[str, Any]
# What diffusers makes betas of.
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")


def schedule_from_config(config: Config, name: str = "the scheduler") -> Parametrisation:
    """Return the parametrisation of the network that a scheduler of diffusers belongs to.

    Parameters
    ----------
    config : mapping
        Configuration of a scheduler, with its ``_class_name``.
    name : str
        Where it is from, for error messages.

    Returns
    -------
    Parametrisation
        On the CPU.

    Raises
    ------
    ValueError
        If the class or one of its values is not supported; it names both and what is.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{name} is a JSON {type(config).__name__}, expected an object: the scheduler's configuration")
    kind = config.get("_class_name")
    if kind is None:
        raise ValueError(f"{name} has no _class_name, which says what the network predicts: expected one of {_names()}")
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"{name} has _class_name {kind!r}, expected one of {_names()}")
    try:
        return READERS[kind](_completed(kind, config))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{name} ({kind}) is not supported: {error}") from error


def read_schedule(folder: str | os.PathLike) -> Parametrisation:
    """Apply ``schedule_from_config`` to the ``scheduler_config.json`` in a folder."""
    path = Path(folder) / SCHEDULER_CONFIG
    return schedule_from_config(read_config(path), str(path))


def config_of(scheduler: Any) -> dict[str, Any]:
    """The configuration of a scheduler in memory, with its class."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def _names() -> str:
    return ", ".join(READERS)


def _completed(kind: str, config: Config) -> dict[str, Any]:
    """The class's own parameters: of the configuration, otherwise the defaults of the class."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    if "num_train_timesteps" not in defaults:
        # diffusers has an empty class in its place if a package that it needs is missing.
        raise ValueError(f"diffusers cannot make it here: {kind} needs a package that is not installed")
    return {"_class_name": kind, **{name: config.get(name, default) for name, default in defaults.items()}}


def _choice(config: Config, name: str, *allowed: Any) -> Any:
    value = config.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")
    return value


def _number(config: Config, name: str) -> float:
    check_number(name, config[name], open_low=True)
    return float(config[name])


def _count(config: Config) -> int:
    check_int("num_train_timesteps", config["num_train_timesteps"], 1)
    return config["num_train_timesteps"]


def _variance_preserving(config: Config) -> Parametrisation:
    from diffusers import DDPMScheduler

    if config.get("use_flow_sigmas", False):
        _choice(config, "prediction_type", "flow_prediction")
        _choice(config, "use_dynamic_shifting", False)
        return _flow(config, config["flow_shift"])
    _choice(config, "prediction_type", *PREDICTION_TYPES)
    _choice(config, "rescale_betas_zero_snr", False)
    _count(config)
    if config.get("trained_betas") is None:
        check_choice("beta_schedule", config["beta_schedule"], BETA_SCHEDULES)
        for name in ("beta_start", "beta_end"):
            check_number(name, config[name], 0, 1, open_low=True, open_high=True)
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    # All of these classes make the same betas of these values.
    return NoiseSchedule.from_scheduler(DDPMScheduler(**{name: config[name] for name in names if name in config}))


def _flow(config: Config, shift: Any) -> Parametrisation:
    size = _count(config)
    shift = _number({"shift": shift}, "shift")
    s = torch.arange(1, size + 1, dtype=torch.float64) / size
    return flow_matching(shift * s / (1 + (shift - 1) * s), time_scale=size, scheduler=config)


def _flow_matching(config: Config) -> Parametrisation:
    # With these the levels depend on the size of the image, or run the other way.
    for name in ("use_dynamic_shifting", "invert_sigmas"):
        _choice(config, name, False)
    _choice(config, "shift_terminal", None)
    return _flow(config, config["shift"])


def _trig_flow(config: Config) -> Parametrisation:
    """SANA-Sprint's: x = cos(u) x_0 + sin(u) eps, which its pipeline rescales to flow matching at sin / (cos + sin)."""
    _choice(config, "prediction_type", "trigflow")
    _number(config, "sigma_data")
    size = _count(config)
    u = torch.arange(1, size + 1, dtype=torch.float64) / size * (math.pi / 2)
    sigmas = u.sin() / (u.cos() + u.sin())
    # Exactly 1, which cos(pi / 2) in float64 is not.
    sigmas[-1] = 1.0
    return flow_matching(sigmas, time_scale=1.0, scheduler=config, one_step_at=size - 1)


def _karras(config: Config) -> torch.Tensor:
    """Levels from sigma_min to sigma_max (EDM, Eq. 5)."""
    size, rho = _count(config), _number(config, "rho")
    low, high = (_number(config, name) ** (1 / rho) for name in ("sigma_min", "sigma_max"))
    if size < 2 or high <= low:
        raise ValueError("expected num_train_timesteps of at least 2 and sigma_max above sigma_min")
    return torch.linspace(low, high, size, dtype=torch.float64) ** rho


def _edm(config: Config) -> Parametrisation:
    sign = 1 if _choice(config, "prediction_type", "epsilon", "v_prediction") == "epsilon" else -1
    _choice(config, "sigma_schedule", "karras")
    sigma_data = _number(config, "sigma_data")
    return preconditioned(_karras(config), sigma_data=sigma_data, time_scale=0.25, scheduler=config, sign=sign)


def _consistency(config: Config) -> Parametrisation:
    sigma_data, boundary = _number(config, "sigma_data"), _number(config, "sigma_min")
    levels = _karras(config)
    # The network's time is log(s) / 4 as in EDM, in thousandths.
    return preconditioned(levels, sigma_data=sigma_data, time_scale=250.0, scheduler=config, boundary=boundary)


# The samplers of one training schedule, which differ in how they step.
_VARIANCE_PRESERVING = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
READERS: dict[str, Callable[[Config], Parametrisation]] = {
    **dict.fromkeys(_VARIANCE_PRESERVING, _variance_preserving),
    "FlowMatchEulerDiscreteScheduler": _flow_matching,
    "SCMScheduler": _trig_flow,
    "EDMEulerScheduler": _edm,
    "CMStochasticIterativeScheduler": _consistency,
}
