"""Triton kernels: one file an operator, each with its launcher."""
