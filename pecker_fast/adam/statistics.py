"""The share of the parameters that the steps of a MaskedAdam have touched."""

from typing import Any

import torch

from .. import ops
from .slots import Slot


def _tensor_stats(optimizer, slot: Slot) -> dict[str, float]:
    """Shares and mean count of one parameter."""
    state, numel = slot.state, slot.param.numel()
    if "step" not in state or numel == 0:
        return {"touched_last": 0.0, "touched_ever": 0.0, "mean_update_count": 0.0}
    step = float(state["step"])
    history = optimizer._history()
    binding = history.binding
    salient = 1.0
    if binding is not None and slot.position in binding.positions:
        salient = binding.mask.tensor_counts()[binding.positions[slot.position]] / numel
    last = salient if history.last_step == "masked" else float(history.last_step is not None)
    if "counts" in state:
        counts = state["counts"].to(torch.int64)
        if "touched_words" in state:
            touched = int(ops.block_counts(state["touched_words"], [0], [numel]).sum())
        else:
            touched = int((counts > 0).sum())
        return {
            "touched_last": last,
            "touched_ever": touched / numel,
            "mean_update_count": float(counts.sum()) / numel,
        }
    # All touched entries share one count: they are those of the only mask, or all entries.
    share = salient if history.regime == "mask" else 1.0
    return {"touched_last": last, "touched_ever": share * (step > 0), "mean_update_count": share * step}


def sparsity_stats(optimizer) -> dict[str, Any]:
    """See ``MaskedAdam.sparsity_stats``."""
    slots = optimizer._slots()
    tensors = {slot.label: _tensor_stats(optimizer, slot) for slot in slots}
    total = sum(slot.param.numel() for slot in slots)
    overall = {
        key: sum(tensors[slot.label][key] * slot.param.numel() for slot in slots) / max(total, 1)
        for key in ("touched_last", "touched_ever", "mean_update_count")
    }
    previous, current = optimizer._history().masks
    return {
        **overall,
        "mask_density": None if current is None else current.density,
        "mask_iou": None if previous is None else current.iou(previous),
        "nonfinite": optimizer.nonfinite_count,
        "tensors": tensors,
    }
