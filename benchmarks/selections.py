"""The rivals of saliency_mask: the same masks as a good engineer would make them in plain torch or numpy.

Each takes the list of gradients and returns one bool tensor (SalUn: int64) for each. They concatenate the gradients
once and select in place if their library lets them.
"""

import ctypes
import inspect
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

Selection = Callable[[list[Tensor], float], list[Tensor]]


def flat_magnitudes(grads: list[Tensor]) -> Tensor:
    return torch.cat([grad.reshape(-1) for grad in grads]).abs_()


def keep(density: float, numel: int) -> int:
    return max(1, int(density * numel))


def masks_from_threshold(grads: list[Tensor], threshold: Tensor) -> list[Tensor]:
    return [grad.abs() >= threshold for grad in grads]


def numpy_partition(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads).float().numpy()
    position = flat.size - keep(density, flat.size)
    flat.partition(position)
    return masks_from_threshold(grads, torch.tensor(flat[position]))


def torch_kthvalue(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads)
    k = keep(density, flat.numel())
    return masks_from_threshold(grads, torch.kthvalue(flat, flat.numel() - k + 1).values)


def torch_topk(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads)
    return mask_of_indices(torch.topk(flat, keep(density, flat.numel()), sorted=False).indices, grads, flat.numel())


def torch_sort(grads: list[Tensor], density: float) -> list[Tensor]:
    flat = flat_magnitudes(grads)
    k = keep(density, flat.numel())
    return masks_from_threshold(grads, torch.sort(flat).values[flat.numel() - k])


def argsort_of_argsort(grads: list[Tensor], density: float) -> list[Tensor]:
    """SalUn's way: rank of every entry by sorting twice, masks as int64 ones and zeros."""
    flat = flat_magnitudes(grads).neg_()
    ranks = torch.argsort(torch.argsort(flat))
    mask = (ranks < keep(density, flat.numel())).long()
    pieces = mask.split([grad.numel() for grad in grads])
    return [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]


def mask_of_indices(indices: Tensor, grads: list[Tensor], numel: int) -> list[Tensor]:
    mask = torch.zeros(numel, dtype=torch.bool, device=indices.device)
    mask[indices.reshape(-1)] = True
    pieces = mask.split([grad.numel() for grad in grads])
    return [piece.view(grad.shape) for piece, grad in zip(pieces, grads, strict=True)]


def flashinfer_top_k(grads: list[Tensor], density: float) -> list[Tensor]:
    import flashinfer

    flat = flat_magnitudes(grads)
    # Newer versions have options for deterministic results and for the lowest index among equal entries.
    wanted = {"deterministic": True, "tie_break": "small_index"}
    options = {key: value for key, value in wanted.items() if key in inspect.signature(flashinfer.top_k).parameters}
    try:
        _, indices = flashinfer.top_k(flat.unsqueeze(0), keep(density, flat.numel()), **options)
    except (TypeError, ValueError):
        _, indices = flashinfer.top_k(flat.unsqueeze(0), keep(density, flat.numel()))
    return mask_of_indices(indices, grads, flat.numel())


def cub_device_top_k(grads: list[Tensor], density: float) -> list[Tensor]:
    library = cub_library()
    flat = flat_magnitudes(grads).float()
    k = keep(density, flat.numel())
    keys, indices = torch.empty(k, device=flat.device), torch.empty(k, dtype=torch.int64, device=flat.device)
    stream = ctypes.c_void_p(torch.cuda.current_stream(flat.device).cuda_stream)
    size = ctypes.c_size_t()
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (flat, keys, indices)]
    counts = ctypes.c_int64(flat.numel()), ctypes.c_int64(k)
    status = library.top_k(None, ctypes.byref(size), *pointers, *counts, stream)
    memory = torch.empty(size.value, dtype=torch.uint8, device=flat.device)
    status = status or library.top_k(ctypes.c_void_p(memory.data_ptr()), ctypes.byref(size), *pointers, *counts, stream)
    if status != 0:
        raise RuntimeError(f"cub::DeviceTopK failed with CUDA error {status}")
    return mask_of_indices(indices, grads, flat.numel())


@cache
def cub_library() -> ctypes.CDLL | None:
    """cub::DeviceTopK behind a C function, compiled here; None if the toolkit has none."""
    from .sass import find_tool

    nvcc, source = find_tool("nvcc"), Path(__file__).with_name("cub_top_k.cu")
    if nvcc is None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    folder = tempfile.mkdtemp(prefix="pecker_fast_cub_")
    library = Path(folder) / "cub_top_k.so"
    command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", f"-arch=sm_{major}{minor}", str(source)]
    if subprocess.run([*command, "-o", str(library)], capture_output=True).returncode != 0:
        return None
    return ctypes.CDLL(str(library))


RIVALS: dict[str, Selection] = {
    "numpy.partition": numpy_partition,
    "torch.kthvalue": torch_kthvalue,
    "torch.topk": torch_topk,
    "torch.sort": torch_sort,
    "argsort of argsort": argsort_of_argsort,
}
CPU_ONLY = {"numpy.partition"}


@cache
def rivals(device: torch.device, dtype: torch.dtype) -> dict[str, Selection]:
    """The rivals that run on this device."""
    chosen = {name: rival for name, rival in RIVALS.items() if device.type == "cpu" or name not in CPU_ONLY}
    if device.type == "cuda":
        if find_spec("flashinfer") is not None:
            chosen["flashinfer.top_k"] = flashinfer_top_k
        if cub_library() is not None:
            chosen["cub::DeviceTopK"] = cub_device_top_k
    return chosen
