"""Peak memory."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device | str) -> int:
    """Peak memory so far in bytes: of the GPU, or of this process if ``device`` is the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
