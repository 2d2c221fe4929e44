"""Triton kernels. The files are in the repository's top-level ``kernels`` folder, which is no package of its own."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]

from .support import operator, why_not

__all__ = ["operator", "why_not"]
