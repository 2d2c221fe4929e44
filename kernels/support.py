"""Which operators the Triton back end has, where they run, and why not. Imports triton only to call a kernel."""

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch

OPERATORS = {
    "radix_histogram": "select",
    "threshold_mask": "select",
    "select": "select",
    "magnitude_sums": "sums",
    "block_counts": "packing",
    "pack": "packing",
    "unpack": "packing",
    "apply_mask_": "pointwise",
    "accumulate_": "pointwise",
    "count_nonfinite": "pointwise",
    "masked_adam_": "masked_adam",
}
"""File of each operator's launcher."""

MINIMUM_CAPABILITY = (8, 0)


def why_not(op: str, device: torch.device) -> str | None:
    """Why ``op`` cannot run on ``device``, or None."""
    if op not in OPERATORS:
        return f"the Triton back end has no operator {op!r}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu":
        if not interpreted:
            return "needs a CUDA device, or TRITON_INTERPRET=1 (set before triton is imported) for CPU tensors"
    elif device.type != "cuda":
        return f"needs a CUDA device, not {device.type!r}"
    elif interpreted:
        return "TRITON_INTERPRET=1 runs CPU tensors only"
    elif not torch.cuda.is_available():
        return "torch finds no CUDA device"
    elif torch.version.hip is not None:
        return "is made for NVIDIA GPUs, and this is a ROCm build of torch"
    elif torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        have, need = torch.cuda.get_device_capability(device), MINIMUM_CAPABILITY
        return f"needs compute capability {need[0]}.{need[1]} or newer, and {device} has {have[0]}.{have[1]}"
    return None


def operator(op: str) -> Callable:
    """The launcher of ``op``, with the signature of its counterpart in ``ops/reference.py``. Imports triton."""
    module = importlib.import_module(f".{OPERATORS[op]}", __package__)
    return getattr(module, op)
