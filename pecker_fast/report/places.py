"""Reports go to others, to whom a place on this machine says nothing."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# As an argument gives it, data sets by "folder:", and options by "name=".
ABSOLUTE = re.compile(r"(?P<before>(?:[\w-]+=)?(?:folder:)?)(?P<path>~?/.*)", re.DOTALL)


def portable(value: Any) -> Any:
    """A JSON value in which no string is an absolute path: below the working directory it becomes relative to that, of
    any other its last part is kept. All else stays as it is."""
    if isinstance(value, Mapping):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [portable(inner) for inner in value]
    found = ABSOLUTE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return value
    path = Path(found["path"]).expanduser()
    return found["before"] + (path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name)
