"""FLOPs of an iteration, and the peak FLOP/s of a device."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .step_problem import METHODS, PRECISIONS, Problem, precision
from .step_rival import Rival
from .timing import interleave

# TFLOP/s of dense products in NVIDIA's data sheets: bfloat16, TF32, float32 without TF32.
PEAKS = {
    "A100": {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5},
    "H100 PCIe": {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0},
    "H100": {"bf16": 989.0, "tf32": 494.0, "fp32": 67.0},
    "H200": {"bf16": 989.0, "tf32": 494.0, "fp32": 67.0},
}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


def named_peak(name: str, kind: str) -> float | None:
    """FLOP/s of a GPU by its name; None for an unknown one.

    ``kind`` is one of PRECISIONS. Convolutions are nearly all of the work, so "default" counts as TF32.
    """
    kind = "tf32" if kind == "default" else kind
    for model, peaks in PEAKS.items():
        if all(word in name for word in model.split()):
            return peaks[kind] * 1e12
    return None


def matmul_rate(device: torch.device, kind: str, max_seconds: float = 2.0) -> float:
    """FLOP/s of a large square matrix product in this precision, the fastest of several."""
    size = MATMUL_SIZE[device.type]
    dtype = torch.bfloat16 if PRECISIONS[kind][0] == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    with precision("tf32" if kind == "default" else kind):
        timing = interleave({"matmul": lambda: a @ b}, device, max_seconds=max_seconds)["matmul"]
    return 2 * size**3 / min(timing.seconds)


def _cpu_attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention, forward and backward. A multiplication and an addition are
    two FLOPs."""
    aten = torch.ops.aten
    # The CPU's attention is missing from torch's table.
    custom = {
        aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counted:
        work()
    return counted.get_total_flops()


def iteration_flops(arch: str, name: str, batch: int, device: torch.device, rival: bool = False, **changes) -> float:
    """FLOPs of an iteration at ``batch`` retained samples, with its share of the mask's.

    They are linear in the batch, so batches of one and two are counted. They are not proportional to it if the preset
    fixes the number of forgotten samples.
    """
    refresh = METHODS[name][1]
    once = name if refresh is None else "pecker-once"

    def counted(part: int) -> tuple[int, int]:
        """FLOPs of an iteration that takes a mask, if masks are taken again and again, and of one that takes none."""
        problem = Problem.make(arch, part, device)
        iteration = Rival(problem, once, **changes) if rival else problem.ours(once, "fp32", **changes)
        first = 0
        # The first iteration takes the mask. It is counted only if its FLOPs are used, because counting is slow.
        if refresh and part == 2:
            first = count_flops(iteration)
        elif refresh is not None:
            iteration()
        return first, count_flops(iteration)

    (_, one), (first, two) = counted(1), counted(2)
    flops = one + (two - one) * (batch - 1)
    if refresh:
        # The first iteration took the mask, on its own number of samples.
        flops += (first - two) * Problem.saliency_batch(batch) / Problem.saliency_batch(2) / refresh
    return flops
