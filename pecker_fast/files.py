"""The one writer of files: a file is complete or absent, even if the process is killed while writing; JSON lines."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync(path: Path, mode: int) -> None:
    """Sets the mode of a file and syncs it to disk."""
    # safetensors creates files that only the owner can read, whatever the umask.
    os.chmod(path, mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; the file written there is synced and replaces ``path`` at the end.

    If writing fails, the old file stays and the temporary one is removed.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        _sync(temporary, mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes or replaces a file of UTF-8 text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes or replaces a JSON file. Raises TypeError for a value that JSON cannot hold, before the file is opened."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes or replaces a safetensors file; ``tensors`` must be contiguous and on the CPU."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, None if metadata is None else dict(metadata))


def write_folder(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Calls ``write`` to fill a temporary folder beside ``path``, syncs its files, and renames it to ``path``.

    If ``path`` exists, its files with the same names are replaced one by one, each atomically; others are kept. Raises
    ValueError if ``path`` is a file.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"path {path} is a file, expected a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    # The mode of new files under the user's umask.
    mode = temporary.stat().st_mode & 0o666
    try:
        write(temporary)
        files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
        for file in files:
            _sync(file, mode)
        if not path.exists():
            os.rename(temporary, path)
            return
        for file in files:
            target = path / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


PENDING = ".pending.json"


def replace_together(folder: str | os.PathLike, names: Sequence[str], write: Callable[[str, Path], None]) -> None:
    """Replaces several files of a folder: all, or none.

    All new files are written beside the old ones first, then a list of them, and then each replaces its old one. If the
    process is killed before the list is written, nothing has happened; after that, ``finish_pending`` does the rest.

    Parameters
    ----------
    folder : path-like
        The folder.
    names : sequence of str
        Names of files in it.
    write : callable
        Called with a name and the path to write its new file to.
    """
    folder = Path(folder)
    finish_pending(folder)
    temporaries = [_pending_name(folder, name) for name in names]
    try:
        for name, temporary in zip(names, temporaries, strict=True):
            mode = (folder / name).stat().st_mode
            write(name, temporary)
            _sync(temporary, mode)
        write_json(folder / PENDING, list(names))
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    finish_pending(folder)


def finish_pending(folder: str | os.PathLike) -> None:
    """Completes what ``replace_together`` began in a folder before it was killed; nothing if there is nothing.

    ValueError if the folder's list of files is not one that ``replace_together`` writes.
    """
    folder = Path(folder)
    if not (folder / PENDING).is_file():
        return
    try:
        names = json.loads((folder / PENDING).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / PENDING} is damaged: {error}") from error
    if not isinstance(names, list) or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{folder / PENDING} is damaged: expected a list of names of files")
    for name in names:
        if _pending_name(folder, name).is_file():
            os.replace(_pending_name(folder, name), folder / name)
    (folder / PENDING).unlink()


def _pending_name(folder: Path, name: str) -> Path:
    return folder / f".{name}.pending"


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file, empty if it does not exist. A line cut short by a kill ends the list."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
