"""MaskedAdam's state dict: checking and placing what is loaded, and export to torch.optim.Adam."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..sharding import like, local
from .options import TORCH_OPTIONS
from .slots import COPIES, PER_ENTRY, Slot

_WORDS = ("mask_words", "touched_words")
_KNOWN = {"step", *_WORDS, *PER_ENTRY}


def restore_state(slot: Slot, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The state of one parameter from a loaded dict: each tensor in its own dtype and memory layout.

    (torch would cast all of it to the parameter's dtype.) Raises ValueError if it does not fit the parameter.
    """
    if "step" not in saved:
        # Before the first step the state has an EMA at most.
        saved = {key: value for key, value in saved.items() if key == "ema"}
    param = slot.param
    compute = ops.compute_dtype(param.dtype)
    packed_count = None
    if slot.packed and "exp_avg_sq" in saved:
        if "mask_words" not in saved:
            raise ValueError(
                f"the state of parameter {slot.label} is not packed: load it into an optimizer with packed=False"
            )
        packed_count = saved["exp_avg_sq"].numel()
    state: dict[str, Tensor] = {}
    for key, value in saved.items():
        if key not in _KNOWN:
            state[key] = value
            continue
        value = local(value) if isinstance(value, Tensor) else value
        if key == "step":
            value = torch.as_tensor(value)
            state[key] = value.to(device=param.device, dtype=torch.float32).reshape(()).clone()
        elif key in _WORDS:
            if value.dtype != torch.int32 or value.numel() != ops.num_words(param.numel()):
                raise ValueError(f"{key} of parameter {slot.label} do not fit its shape {tuple(param.shape)}")
            state[key] = value.to(param.device)
        elif key == "exp_avg" and slot.group["betas"][0] == 0:
            continue
        elif packed_count is not None and not (key in COPIES and value.shape == param.shape):
            if value.shape != (packed_count,):
                raise ValueError(
                    f"{key} of parameter {slot.label} has shape {tuple(value.shape)}, expected ({packed_count},)"
                )
            dtype = value.dtype if key == "counts" else compute
            state[key] = value.to(device=param.device, dtype=dtype).clone()
        else:
            if value.shape != param.shape:
                packed = value.dim() == 1 and "mask_words" in saved
                hint = ": it is packed, load it with packed=True" if packed else ""
                raise ValueError(
                    f"{key} of parameter {slot.label} has shape {tuple(value.shape)}, "
                    f"the parameter {tuple(param.shape)}{hint}"
                )
            if key == "counts":
                state[key] = slot.zeros(torch.int32).copy_(value.to(param.device, torch.int32)).to(value.dtype)
            else:
                state[key] = slot.zeros(compute).copy_(value)
    if packed_count is not None:
        # Older versions packed moments only.
        for key in COPIES:
            if key in state and state[key].shape == param.shape:
                state[key] = slot.salient(state[key], state["mask_words"], packed_count)
    return state


def sharded_state(slot: Slot) -> dict[str, Tensor]:
    """The state of one parameter, in which tensors of its shape are sharded like it."""
    dense = () if slot.packed else PER_ENTRY
    return {key: like(value, slot.owner) if key in dense else value for key, value in slot.state.items()}


def torch_state(slot: Slot, uniform: bool) -> dict[str, Tensor]:
    """The state of one parameter as torch.optim.Adam keeps it: dense, with a first moment.

    ``uniform``: whether all entries share the parameter's step count.
    """
    state, param = slot.state, slot.param
    if "step" not in state:
        return {}
    step = state["step"].clone()
    if not uniform:
        counts = state["counts"].to(torch.int64)
        if counts.numel() and not bool((counts == counts.flatten()[0]).all()):
            raise ValueError(
                f"entries of parameter {slot.label} have had different numbers of updates, "
                "which torch.optim.Adam cannot hold"
            )
        step = counts.flatten()[0].to(torch.float32) if counts.numel() else step
    out = {"step": step}
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if key == "max_exp_avg_sq" and key not in state:
            continue
        if key not in state:
            value = torch.zeros_like(param, dtype=ops.compute_dtype(param.dtype), requires_grad=False)
        elif slot.packed:
            value = ops.unpack(state[key], state["mask_words"], param.numel()).view(param.shape)
        else:
            value = state[key].clone()
        out[key] = value
    return out


def torch_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of a state dict with torch's own options only."""
    keep = {*TORCH_OPTIONS, "params", "param_names"}
    schedulers = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
    return [{key: value for key, value in group.items() if key in keep | schedulers} for group in groups]
