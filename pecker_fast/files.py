"""Files that are there whole or not at all, whatever kills a process while it writes; and files of JSON lines."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _settle(path: Path, mode: int) -> None:
    """Syncs a file, and gives it a mode."""
    # safetensors lets its user alone read what it writes, whatever the umask.
    os.chmod(path, mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path`` to write a file to, which is synced and takes the place of ``path`` at the end.
    Where that fails, what was there stays, and nothing is left."""
    path = Path(path)
    temporary = _beside(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        _settle(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces a file of UTF-8 text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Replaces a file of JSON. TypeError for what JSON does not know, before the file is opened."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replaces a file of safetensors; ``tensors`` are contiguous and on the CPU."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, None if metadata is None else dict(metadata))


def write_folder(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a folder under a temporary name beside ``path``, syncs its files, and renames it.

    Where the folder exists, its files of these names are replaced, each at once, and others are left. ValueError where
    ``path`` is a file.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"path {path} is a file, expected a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    # As new files of this user are.
    mode = temporary.stat().st_mode & 0o666
    try:
        write(temporary)
        files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        for file in files:
            _settle(file, mode)
        if not path.exists():
            os.rename(temporary, path)
            return
        for file in files:
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, none where it is not there; a last line that a kill cut short is passed
    over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
