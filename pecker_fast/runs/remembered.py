"""What earlier runs recorded: a command takes preset, data set, judge and class names from the run it starts from."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..records import RecordError, check_object, read_object
from ..run_records import Config
from .presets import PRESETS

# The preset of a command that starts from no run.
USUAL = "digits"


def record_of(path: str | os.PathLike | None) -> dict[str, Any]:
    """config.json of the run, the pretraining or the distillation whose folder ``path`` is, or whose network is there.

    Empty if it is none of them.

    Raises
    ------
    RecordError
        If it is damaged: a field is not of its type.
    """
    for folder in () if path is None else (Path(path), Path(path).parent):
        try:
            record = read_object(folder / "config.json")
        except RecordError:
            continue
        # That of a network has no preset.
        if isinstance(record.get("preset"), str) and record["preset"] in PRESETS:
            check_object(record, Config, str(folder / "config.json"))
            return record
    return {}


def remembered_preset(*paths: str | os.PathLike | None) -> str:
    """The preset of the first of these folders that is of a run; "digits" if none is."""
    return next((record["preset"] for record in map(record_of, paths) if record), USUAL)


def preset_from(option: Callable[[str], str | None]) -> str:
    """The preset of a command: the one that is set, or that of the run it starts from.

    Parameters
    ----------
    option : callable
        From the name of an option to its value, None if it is not set.
    """
    return option("preset") or remembered_preset(option("pretrained_model_name_or_path"), option("distilled"))
