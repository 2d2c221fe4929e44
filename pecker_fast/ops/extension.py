"""Loads the compiled kernels, or tells why they are missing."""

import importlib.machinery
import json
from functools import cache
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_BUILD_RECORD = _PACKAGE / "_build.json"
_LIBRARIES = {"cpu": "_C", "cuda": "_C_cuda"}


def build_record() -> dict[str, str | None]:
    """The record of setup.py: why the "cpu" and "cuda" kernels were not built; None if they were."""
    try:
        return json.loads(_BUILD_RECORD.read_text())
    except FileNotFoundError:
        return {}


def library_path(backend: str) -> Path | None:
    """The file with the compiled kernels of ``backend`` for this Python, None if there is none."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _PACKAGE / (_LIBRARIES[backend] + suffix)
        if path.exists():
            return path
    return None


@cache
def why_missing(backend: str) -> str | None:
    """Loads the compiled kernels of ``backend`` ("cpu" or "cuda"): None, or the reason why that cannot be done."""
    path = library_path(backend)
    if path is None:
        reason = build_record().get(backend)
        return reason or "not built: install the package with a C++ compiler (pip install --no-build-isolation -e .)"
    try:
        # Registers the kernels with PyTorch's dispatcher. As no Python module, they need no Python headers to build.
        torch.ops.load_library(path)
    except OSError as error:
        # Reports show this text, and paths of this machine mean nothing to their readers.
        reason = str(error).replace(str(path), path.name)
        return f"{path.name} cannot be loaded, most likely built for another torch: {reason}"
    return None


def cpu_isa() -> str | None:
    """Instruction set that the CPU kernels run with: "scalar", "avx2" or "avx512"; None if they are missing."""
    return None if why_missing("cpu") else torch.ops.pecker_fast.cpu_isa()
