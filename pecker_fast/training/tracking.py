"""Trackers that receive the log beside train.jsonl."""

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checks import check_choice
from ..files import write_text

TRACKERS = ("none", "tensorboard", "wandb")
# Where a run's name for Weights & Biases is kept, so that a resumed run goes on under it.
WANDB_ID = "wandb-id.txt"

Log = Callable[[dict[str, Any]], None]


def check_tracker(report_to: str) -> None:
    """Check that a tracker exists and is installed. ValueError if not."""
    check_choice("report_to", report_to, TRACKERS)
    if report_to != "none" and find_spec(report_to) is None:
        raise ValueError(f"report_to is {report_to!r}, which is not installed: pip install {report_to}")


@contextmanager
def tracker(report_to: str, folder: Path, config: Mapping[str, Any] | None = None) -> Iterator[Log | None]:
    """A function to call with every record of the log; None for "none".

    Parameters
    ----------
    report_to : {"none", "tensorboard", "wandb"}
        The tracker.
    folder : Path
        Folder of the run, into which both write.
    config : Mapping, optional
        What is tracked, as JSON, for wandb.

    Raises
    ------
    ValueError
        If there is no such tracker, or it is not installed or cannot start.
    """
    check_tracker(report_to)
    if report_to == "none":
        yield None
        return
    log, close = _tensorboard(folder) if report_to == "tensorboard" else _wandb(folder, config or {})
    try:
        yield log
    finally:
        close()


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


def _tensorboard(folder: Path) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(record: dict[str, Any]) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])

    return log, writer.close


def _wandb(folder: Path, config: Mapping[str, Any]) -> tuple[Log, Callable[[], None]]:
    """WANDB_MODE, WANDB_PROJECT and the like are read by wandb itself."""
    import wandb

    file = folder / WANDB_ID
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:12] + "\n")
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "pecker-fast"),
            name=folder.name,
            id=file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
    except Exception as error:
        raise ValueError(
            f'report_to is "wandb", which cannot start: {error} (WANDB_MODE=offline writes into the folder of the run)'
        ) from error
    # A resumed run logs steps again, which its own counter would refuse.
    run.define_metric("*", step_metric="step")

    def log(record: dict[str, Any]) -> None:
        run.log({**_numbers(record), "step": record["step"]})

    return log, run.finish
