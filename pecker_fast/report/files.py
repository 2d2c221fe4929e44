"""Files of a run: read with what a kill may have left, written all or nothing."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_lines, replacing


@dataclass(frozen=True)
class Run:
    """What a run's folder holds; what is missing is empty."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises ValueError where there is no metrics.json: the run has not ended."""
        folder = Path(folder)
        if not (folder / "metrics.json").is_file():
            raise ValueError(f"{folder} has no metrics.json: it is not the folder of a run that has ended")
        lines = (read_lines(folder / f"{name}.jsonl") for name in ("train", "evaluation"))
        return cls(folder, _json(folder / "config.json"), _json(folder / "metrics.json"), *lines)

    def json(self, name: str) -> dict[str, Any]:
        """The object in ``name``.json of the folder; empty where there is no such file."""
        return _json(self.folder / f"{name}.json")

    @property
    def mask(self) -> dict[str, Any]:
        """The last line of the log that tells of a mask; empty for methods without one."""
        return next((line for line in reversed(self.log) if "mask_density" in line), {})

    @property
    def reached(self) -> float | None:
        """Percent of the parameters that the forget gradient reached at some time: those that a mask ever had, without
        one all that are trained. None where that was not recorded."""
        if self.mask:
            return 100 * self.mask["mask_touched_ever"]
        return self.metrics.get("parameters_trained")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def write_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    """The lines, the head first; None becomes an empty cell."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(["" if cell is None else cell for cell in line] for line in lines)
