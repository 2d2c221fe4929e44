"""Peak memory of a selection beyond its gradients and its mask.

On a GPU torch's allocator knows it. On the CPU a fresh process takes the difference between its peak resident memory
(VmHWM, reset before the call) and the resident memory before, so that C++ vectors and numpy count as well as tensors.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys

import torch

import pecker_fast as pf

from .inputs import DTYPES, Problem
from .selections import rivals


def run_selection(problem: Problem, name: str, size: str | None = None):
    """A call without arguments that makes a mask at density 0.5 in the way called ``name``."""
    grads = Problem(size or problem.size, problem.dtype, problem.device, problem.backend).gradients()
    rival = rivals(problem.device, problem.dtype).get(name)
    if rival is not None:
        tensors = list(grads.values())
        return lambda: rival(tensors, 0.5)
    return lambda: pf.saliency_mask(grads, density=0.5, backend=problem.backend)


def mask_bytes(result) -> int:
    """Bytes of the mask that a selection returned, which are not extra."""
    if isinstance(result, pf.SaliencyMask):
        return result.words.nbytes
    return sum(mask.nbytes for mask in result)


def extra_memory_share(problem: Problem, name: str) -> float:
    """Peak memory of one selection beyond gradients and mask, as a share of the gradients' bytes."""
    measure = _on_cuda if problem.device.type == "cuda" else _in_fresh_process
    return measure(problem, name) / (problem.numel * problem.itemsize)


def _on_cuda(problem: Problem, name: str) -> int:
    run_selection(problem, name, size="tiny")()
    select = run_selection(problem, name)
    torch.cuda.synchronize(problem.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(problem.device)
    before = torch.cuda.memory_allocated(problem.device)
    result = select()
    torch.cuda.synchronize(problem.device)
    return torch.cuda.max_memory_allocated(problem.device) - before - mask_bytes(result)


def _in_fresh_process(problem: Problem, name: str) -> int:
    (dtype,) = (key for key, value in DTYPES.items() if value == problem.dtype)
    request = {"size": problem.size, "dtype": dtype, "backend": problem.backend, "name": name}
    request["threads"] = torch.get_num_threads()
    # Map every large block when it is allocated and unmap it when it is freed. Otherwise the allocator could reuse
    # freed memory, which would hide the memory that the selection takes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "pecker_fast.benchmarks.memory", json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"measuring the memory of {name} failed: {result.stderr.strip()}")
    return json.loads(result.stdout)["extra_bytes"]


def status_bytes(field: str) -> int:
    """A figure of this process in /proc (Linux), such as VmRSS, its resident memory, and VmHWM, the peak of it."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_reset() -> None:
    """Give freed memory back, and let VmHWM start at the present resident memory (Linux)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")


def peak_growth(function) -> tuple[object, int]:
    """The result of ``function``, and the peak growth of resident memory in bytes while it ran."""
    if sys.platform != "linux":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = function()
        return result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    peak_reset()
    before = status_bytes("VmRSS")
    result = function()
    return result, status_bytes("VmHWM") - before


def _extra_here(request: dict) -> int:
    torch.set_num_threads(request["threads"])
    problem = Problem(request["size"], DTYPES[request["dtype"]], backend=request["backend"])
    # The first call loads code and starts threads; on a small input that does not cost much memory.
    run_selection(problem, request["name"], size="small")()
    select = run_selection(problem, request["name"])
    gc.collect()
    result, growth = peak_growth(select)
    return growth - mask_bytes(result)


if __name__ == "__main__":
    print(json.dumps({"extra_bytes": _extra_here(json.loads(sys.argv[1]))}))
