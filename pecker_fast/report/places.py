"""Paths in reports: an absolute path of this machine means nothing to the reader."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# An argument may have "folder:" (a data set) or "name=" (an option) before the path.
ABSOLUTE = re.compile(r"(?P<before>(?:[\w-]+=)?(?:folder:)?)(?P<path>~?/.*)", re.DOTALL)


def portable(value: Any) -> Any:
    """A JSON value without absolute paths.

    Paths below the working directory become relative to it; of other absolute paths only the last part remains.
    """
    if isinstance(value, Mapping):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [portable(inner) for inner in value]
    match = ABSOLUTE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    path = Path(match["path"]).expanduser()
    return match["before"] + (path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name)
