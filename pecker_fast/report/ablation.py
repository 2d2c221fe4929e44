"""A study over seeds: figures of each run, intervals, paired differences, and plots."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AblationRun:
    """A run of a study: its place, its figures at the end, and its curves."""

    preset: str
    pair: str
    condition: str
    factor: str
    seed: int
    figures: dict[str, float | None]
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    @classmethod
    def read(
        cls, folder: Path, *, condition: str, factor: str, preset: str, pair: str, drift: float | None
    ) -> "AblationRun":
        raise NotImplementedError


def write_ablation(folder: Path, runs: Sequence[AblationRun], **more: Any) -> Path:
    raise NotImplementedError
