"""Compiles CUDA sources for the host, with ``cuda_emulator.h`` in place of CUDA, and loads them."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).resolve().parent
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-w", "-DPF_EMULATE_CUDA"]


def compiler() -> str | None:
    """The C++ compiler, or None without GCC or clang on Linux, which the emulator needs."""
    if os.name != "posix":
        return None
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or "g++") or shutil.which("clang++")


# For tests that run emulated kernels.
needs_compiler = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler on a POSIX system")


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256(repr((_FLAGS, compiler())).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _build(sources: Sequence[Path], target: Path) -> None:
    include = [f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        jobs = [
            [compiler(), *_FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(result)]
            for source, result in zip(sources, objects, strict=True)
        ]
        for first in range(0, len(jobs), 2):
            running = [subprocess.Popen(job, stderr=subprocess.PIPE, text=True) for job in jobs[first : first + 2]]
            for process in running:
                _, errors = process.communicate()
                if process.returncode != 0:
                    raise RuntimeError(f"{' '.join(process.args)} failed:\n{errors}")
        library = Path(folder) / target.name
        subprocess.run([compiler(), "-shared", *map(str, objects), "-o", str(library)], check=True)
        # Appears whole or not at all.
        library.replace(target)


@cache
def load(name: str, kernels: tuple[str, ...]) -> ctypes.CDLL:
    """The library of ``tests/emulation/<name>.cpp`` and ``csrc/cuda/<kernel>.cu``; cached in the temporary folder."""
    sources = [EMULATION / f"{name}.cpp", *(ROOT / "csrc" / "cuda" / f"{kernel}.cu" for kernel in kernels)]
    headers = [p for folder in ("cuda", "common") for p in (ROOT / "csrc" / folder).glob("*.*h")]
    folder = Path(tempfile.gettempdir()) / f"pecker_fast_emulation_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{name}_{_digest([*sources, *headers, EMULATION / 'cuda_emulator.h'])}.so"
    import fcntl  # with a compiler there is POSIX

    # One test process builds, the others wait for it.
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(sources, target)
    return ctypes.CDLL(str(target))
