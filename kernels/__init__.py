"""Triton kernels: one file per family of operators, each with its launchers. Importing this imports no triton."""

from .support import operator, why_not

__all__ = ["operator", "why_not"]
