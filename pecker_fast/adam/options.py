"""MaskedAdam's options and their allowed values."""

from typing import Any

import torch
from torch import Tensor

from ..ops.dispatch import requested_backend

# Adam's own options, which torch's state_dict carries too.
TORCH_OPTIONS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
)
GROUP_OPTIONS = ("clip_value", "ema_decay", "max_update", "variance")
# Options of the optimizer as a whole: they shape the state or the step, so groups may not differ in them.
SHARED_OPTIONS = ("packed", "master_weights", "stochastic_rounding", "seed", "nonfinite", "backend")
# Options that a step checks again if they change. The learning rate changes at every step anyway.
OPTIONS = tuple(name for name in (*TORCH_OPTIONS, *GROUP_OPTIONS, *SHARED_OPTIONS) if name != "lr")

VARIANCES = ("combined", "retain")
NONFINITE_POLICIES = ("propagate", "skip", "zero", "raise")


def _choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def _positive(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, (int, float)) and value > 0):
        raise ValueError(f"{name} is {value!r}, expected a number > 0 or None")


def scalar(value: float | Tensor) -> float:
    """A beta as a number."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def check_betas(betas: Any) -> tuple[float, float]:
    """Adam's betas as two floats. The messages are torch's."""
    for i in (0, 1):
        if not 0.0 <= betas[i] < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    for i in (0, 1):
        if isinstance(betas[i], Tensor) and betas[i].numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
    return scalar(betas[0]), scalar(betas[1])


def check_options(options: dict[str, Any]) -> None:
    """Checks the options of a parameter group or the defaults; ``betas`` become floats. The messages are torch's where
    torch has one.
    """
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor):
        if options["foreach"] and not options["capturable"]:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    # A CUDA lr is not read: that would wait for the device.
    if not (isinstance(lr, Tensor) and lr.is_cuda) and not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not options["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {options['eps']}")
    if not options["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
    checked = check_betas(betas)
    for i in (0, 1):
        if isinstance(betas[i], Tensor) and options["foreach"] and not options["capturable"]:
            raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
    options["betas"] = checked
    if options["differentiable"]:
        if options["fused"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        raise ValueError(
            "differentiable=True is not supported: the step is not recorded by autograd, use torch.optim.Adam"
        )
    if options["foreach"] and options["fused"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    _positive("clip_value", options["clip_value"])
    _positive("max_update", options["max_update"])
    decay = options["ema_decay"]
    if decay is not None and not (isinstance(decay, (int, float)) and 0 <= decay <= 1):
        raise ValueError(f"ema_decay is {decay!r}, expected a number in [0, 1] or None")
    _choice("variance", options["variance"], VARIANCES)
    _choice("nonfinite", options["nonfinite"], NONFINITE_POLICIES)
    if options["master_weights"] and options["stochastic_rounding"]:
        raise ValueError("master_weights and stochastic_rounding are two ways to keep small updates, choose one")
    seed = options["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, expected a 64-bit integer")
    requested_backend(options["backend"])


def fill_options(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Adds missing options to a parameter group that the user made by hand."""
    for name, value in defaults.items():
        group.setdefault(name, value)


def check_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Checks a parameter group that has all options filled in, and its parameters."""
    check_options(group)
    for name in SHARED_OPTIONS:
        if group[name] != defaults[name]:
            raise ValueError(
                f"{name} is {group[name]!r} in a parameter group, but holds for the whole optimizer: {defaults[name]!r}"
            )
    if (group["ema_decay"] is None) != (defaults["ema_decay"] is None):
        raise ValueError("ema_decay is set in some parameter groups only, set it for all or none")
    names = group.get("param_names") or []
    for i, param in enumerate(group["params"]):
        label = names[i] if i < len(names) else i
        if param.dtype.is_complex:
            raise TypeError(
                f"parameter {label} is {param.dtype}: complex parameters are not supported, use torch.view_as_real"
            )
        if param.layout is not torch.strided:
            raise TypeError(f"parameter {label} has layout {param.layout}: only dense parameters are supported")
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"parameter {label} is {param.dtype}, expected float32, bfloat16, float16 or float64")
