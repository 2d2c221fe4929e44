"""The files of a run's folder, as reports read them."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..figures import FORGOTTEN, derived
from ..files import replacing
from ..run_records import read_evaluations, read_file, read_history, read_log


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run's folder; missing files are empty.

    Parameters
    ----------
    folder : Path
    config, metrics : dict
        config.json and metrics.json.
    log, evaluations : list of dict
        train.jsonl and evaluation.jsonl.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "RunRecord":
        """Reads a folder. ValueError if it has no metrics.json (the run has not ended), or a file is damaged."""
        folder = Path(folder)
        if not (folder / "metrics.json").is_file():
            raise ValueError(f"{folder} has no metrics.json: it is not the folder of a run that has ended")
        config, metrics = read_file(folder, "config"), read_file(folder, "metrics")
        return cls(folder, config, metrics, read_log(folder), read_evaluations(folder))

    def json(self, name: str) -> dict[str, Any]:
        """The object in ``name``.json of the folder; empty if there is no such file."""
        return read_file(self.folder, name)

    @property
    def history(self) -> list[dict[str, Any]]:
        """When the run was started, resumed and ended (history.jsonl); empty if it was not recorded."""
        return read_history(self.folder)

    @property
    def method(self) -> str:
        return str(self.config.get("method", self.metrics.get("method", "unknown")))

    @property
    def of_prompts(self) -> bool:
        """Whether the run forgets prompts of a text-to-image model; otherwise it forgets classes."""
        return "prompts" in self.config

    @property
    def figures(self) -> dict[str, Any]:
        """metrics.json with the figures that follow from it, from the evaluations and from the log."""
        result = derived(self.metrics)
        samples = (self.metrics.get("protocol") or {}).get("concept", {}).get("samples", {})
        if samples.get("sampler") is not None:
            # What was measured was drawn so, whatever the run itself would draw with.
            steps = 1 if samples["sampler"] == "one_step" else samples.get("num_inference_steps")
            result["sampling_steps"] = steps
        result["images_to_forget"] = images_to_forget(self.evaluations)
        if result.get("reached") is None:
            result["reached"] = self.reached
        return result

    @property
    def mask(self) -> dict[str, Any]:
        """The last line of the log that describes a mask; empty for methods without one."""
        return next((line for line in reversed(self.log) if "mask_density" in line), {})

    @property
    def reached(self) -> float | None:
        """Percent of the parameters that the forget gradient reached at any time; None if that was not recorded.

        Under a mask these are the entries that were salient at any time, without one all that are trained.
        """
        if self.mask:
            return 100 * self.mask["mask_touched_ever"]
        return self.metrics.get("parameters_trained")


def images_to_forget(evaluations: Sequence[Mapping[str, Any]], least: float = FORGOTTEN) -> float | None:
    """Images seen at the first evaluation from which UA stays at ``least`` percent or more; None if there is none."""
    images = None
    for record in evaluations:
        if record.get("ua") is None:
            continue
        if record["ua"] < least:
            images = None
        elif images is None:
            images = record["images"]
    return images


def write_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    """The lines, the head first; None becomes an empty cell."""
    with replacing(path) as temporary, open(temporary, "w", newline="") as file:
        csv.writer(file).writerows(["" if cell is None else cell for cell in line] for line in lines)
