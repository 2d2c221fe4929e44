"""What the Triton back end can run. Imports triton only to find out whether it is there."""

import importlib.util
import os

import torch


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, device: torch.device, dtypes: set[torch.dtype]) -> str | None:
    """None if the Triton kernel of ``op`` can run on tensors of ``dtypes`` on ``device``, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and not interpreting():
        return "needs a CUDA device, or TRITON_INTERPRET=1 to run in Triton's interpreter on the CPU"
    if device.type not in ("cpu", "cuda"):
        return f"runs on CUDA devices, not on {device.type}"
    return None
