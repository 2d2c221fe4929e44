"""What the package runs on: versions, processor, GPUs, and which back ends there are or why not."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

from . import ops
from .ops import extension
from .ops.dispatch import BACKENDS, automatic_backend, requested_backend
from .ops.schemas import SCHEMAS

PACKAGES = ("torch", "triton", "numpy", "safetensors", "scikit-learn")


def version(package: str) -> str | None:
    """The installed version of a distribution, None where it is not installed. Does not import it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the operating system tells it."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[str]:
    """Types of device that torch can use here: "cpu", and "cuda" where there is one."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def gpus() -> list[dict[str, Any]]:
    """Name, memory and compute capability of each GPU."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    return found


def backends() -> dict[str, str | None]:
    """For each back end None if it can run on one of the devices here, else the reason why it cannot."""
    found: dict[str, str | None] = {}
    for backend in BACKENDS:
        home = "cuda" if backend in ("cuda", "triton") else "cpu"
        if home in devices():
            found[backend] = ops.backend_reasons(home)[backend]
        elif backend == "triton":
            found[backend] = ops.backend_reasons("cpu")[backend]
        else:
            gpu = f"torch {torch.__version__} finds no CUDA device"
            missing = extension.why_missing(backend)
            found[backend] = f"{gpu}; kernels: {missing}" if missing else gpu
    return found


def chosen_backends() -> dict[str, dict[str, str]]:
    """For each device the back end that runs each operator when none is asked for by argument."""
    requested = requested_backend()
    return {device: {op: requested or automatic_backend(op, device) for op in SCHEMAS} for device in devices()}


def collect() -> dict[str, Any]:
    """Everything that ``pecker-fast env`` shows, ready for JSON."""
    from . import __version__

    return {
        "pecker_fast": __version__,
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "cuda_of_torch": torch.version.cuda,
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_isa": extension.cpu_isa(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus(),
        "requested_backend": requested_backend(),
        "backends": backends(),
        "chosen": chosen_backends(),
    }


def describe(environment: dict[str, Any]) -> str:
    """``collect()`` as lines of text."""
    packages = environment["packages"]
    lines = [
        f"pecker_fast   {environment['pecker_fast']}",
        f"python        {environment['python']}",
        *(f"{name:<13} {found or 'not installed'}" for name, found in packages.items()),
        f"system        {environment['os']}",
        f"cpu           {environment['cpu']}, {environment['cpu_cores']} cores, {environment['torch_threads']} threads, "
        f"kernels use {environment['cpu_isa'] or 'no compiled code'}",
    ]
    for gpu in environment["gpus"]:
        memory = gpu["memory_bytes"] / 2**30
        lines.append(f"gpu           {gpu['name']}, {memory:.0f} GiB, compute capability {gpu['capability']}")
    if not environment["gpus"]:
        built = environment["cuda_of_torch"]
        lines.append(f"gpu           none found (torch is built {'for CUDA ' + built if built else 'without CUDA'})")
    lines += ["", "back ends"]
    for name, reason in environment["backends"].items():
        lines.append(f"  {name:<11} {'available' if reason is None else 'not available: ' + reason}")
    if environment["requested_backend"]:
        lines.append(f"  {environment['requested_backend']} is asked for by set_backend or the environment")
    for device, chosen in environment["chosen"].items():
        lines += ["", f"chosen on {device}"]
        by_backend: dict[str, list[str]] = {}
        for op, backend in chosen.items():
            by_backend.setdefault(backend, []).append(op)
        lines += [f"  {backend:<11} {', '.join(names)}" for backend, names in by_backend.items()]
    return "\n".join(lines)
