"""Where the log goes beside train.jsonl."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def tracker(report_to: str, folder: Path) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """What to call with every record of the log; None for "none". ValueError for a tracker that is not there."""
    if report_to == "none":
        yield None
        return
    if report_to != "tensorboard":
        raise ValueError(f'report_to is {report_to!r}, expected "none" or "tensorboard"')
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
