"""Benchmarks. The files are in the repository's top-level ``benchmarks`` folder, which is no package of its own."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
