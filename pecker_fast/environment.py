"""What this installation can do, and why not more: versions, devices and back ends."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .ops.dispatch import BACKENDS, automatic_backend, requested_backend, why_not
from .ops.extension import cpu_isa, why_missing
from .ops.schemas import SCHEMAS

_PACKAGES = ("pecker-fast", "torch", "triton", "numpy", "safetensors", "scikit-learn", "torchvision", "diffusers")
_PACKAGES += ("torch-fidelity", "transformers")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The name of the processor, from the operating system."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache
def code_commit() -> str | None:
    """The commit of the code, with "-modified" if files that git knows differ from it.

    None if the package does not run from a checkout, or there is no git.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            # Without locks: somebody else may be committing.
            subprocess.run(
                ["git", "--no-optional-locks", "-C", str(root), *words],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("-modified" if changes.stdout.strip() else "")


def code_facts() -> dict[str, str | None]:
    """Which code runs: "version" and "commit" of this package, and the versions of "python" and "torch"."""
    return {
        "version": __version__,
        "commit": code_commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def environment() -> dict[str, Any]:
    """Collect versions, devices and back ends.

    Returns
    -------
    dict
        As JSON. For each device, "backends" has the reason why a back end cannot be used, or None, and "chosen" the
        back end of each operation.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    requested = requested_backend()
    missing_cuda = None if len(devices) > 1 else "torch finds no CUDA device"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "commit": code_commit(),
        "torch_cuda": torch.version.cuda,
        "cpu": cpu_model(),
        "cpu_instruction_set": cpu_isa(),
        "cpu_cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "requested_backend": requested,
        "backends": {
            device: {backend: why_not(backend, "select", torch.device(device)) for backend in BACKENDS}
            for device in devices
        },
        "no_cuda_device": missing_cuda,
        "cuda_kernels": why_missing("cuda"),
        "chosen": {device: {op: requested or automatic_backend(op, device) for op in SCHEMAS} for device in devices},
    }


def describe_environment(facts: dict[str, Any]) -> str:
    """Format the result of ``environment`` as lines to read."""
    lines = [f"python {facts['python']} on {facts['platform']}"]
    lines += [f"{name} {version or 'not installed'}" for name, version in facts["packages"].items()]
    if facts["commit"]:
        lines.append(f"commit {facts['commit']}")
    isa = facts["cpu_instruction_set"]
    lines.append(
        f"CPU {facts['cpu']}, {facts['cpu_cores']} cores, {facts['threads']} threads, kernels: {isa or 'none compiled'}"
    )
    lines.append(f"GPU {', '.join(facts['gpus']) or facts['no_cuda_device']}")
    lines.append(f"compiled CUDA kernels: {facts['cuda_kernels'] or 'installed'}")
    if facts["requested_backend"]:
        lines.append(f"requested back end: {facts['requested_backend']}")
    for device, backends in facts["backends"].items():
        lines.append(f"\non {device} tensors")
        lines += [f"  {backend:10} {'available' if reason is None else reason}" for backend, reason in backends.items()]
        by_backend: dict[str, list[str]] = {}
        for op, backend in facts["chosen"][device].items():
            by_backend.setdefault(backend, []).append(op)
        lines += [f"  chosen: {backend} for {', '.join(names)}" for backend, names in by_backend.items()]
    return "\n".join(lines)
