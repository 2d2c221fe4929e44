"""Trackers that receive the log beside train.jsonl."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import check_choice


@contextmanager
def tracker(report_to: str, folder: Path) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A function to call with every record of the log; None for "none".

    Parameters
    ----------
    report_to : {"none", "tensorboard"}
        The tracker.
    folder : Path
        Folder of the run.

    Raises
    ------
    ValueError
        If there is no such tracker, or it is not installed.
    """
    check_choice("report_to", report_to, ("none", "tensorboard"))
    if report_to == "none":
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError('report_to is "tensorboard", which is not installed: pip install tensorboard') from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                writer.add_scalar(name, value, record["step"])

    try:
        yield log
    finally:
        writer.close()
