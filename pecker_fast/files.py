"""The one writer of files: a file is complete or absent, even if the process is killed while writing; JSON lines.

Temporary files have the machine and the number of their process in their names, so that those of killed processes are
known: ``clear_leftovers`` removes them.
"""

import glob
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

# This machine, as it appears in names of files.
HOST = re.sub(r"[^\w-]", "-", platform.node())[:40] or "unknown"
# .NAME.@HOST.PID.tmp; earlier versions left out the host.
_TEMPORARY = re.compile(r"\..+?(?:\.@([\w-]+))?\.(\d+)\.tmp", re.DOTALL)
# A temporary file whose process cannot be looked for, such as another machine's, is left alone for this many seconds.
PATIENCE = 86400


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.@{HOST}.{os.getpid()}.tmp")


def is_alive(pid: int) -> bool:
    """Whether this machine has a process with this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It belongs to another user.
        return True
    return True


def clear_leftovers(folder: str | os.PathLike) -> list[Path]:
    """Remove what killed processes were writing in ``folder``, below it, and beside it under its name.

    Only names that this module makes are removed, never those of a living process. Files that cannot be removed stay.

    Returns
    -------
    list of Path
        What was removed.
    """
    folder = Path(folder)
    for pending in folder.rglob(PENDING):
        # What was written completely is put in place.
        finish_pending(pending.parent)
    beside = folder.absolute().parent.glob(f".{glob.escape(folder.absolute().name)}.*.tmp")
    removed = []
    for path in [*beside, *_hidden(folder)]:
        if _is_leftover(path):
            _remove(path)
            removed.append(path)
    return removed


def _hidden(folder: Path) -> Iterator[Path]:
    """Hidden entries of a folder and of those in it. Links are not followed."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if name.startswith("."):
                yield Path(place, name)
        folders[:] = [name for name in folders if not name.startswith(".")]


def _is_leftover(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    if match is not None and match[1] in (None, HOST):
        return not is_alive(int(match[2]))
    # Earlier versions named files that are replaced together .NAME.pending.
    if match is None and not path.name.endswith(".pending"):
        return False
    try:
        return time.time() - path.lstat().st_mtime > PATIENCE
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        # For example another user's.
        return


def _sync(path: Path, mode: int) -> None:
    """Sets the mode of a file and syncs it to disk."""
    # safetensors creates files that only the owner can read, whatever the umask.
    os.chmod(path, mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns safetensors' own error, such as that of a full disk, into OSError."""
    try:
        yield
    except Exception as error:
        # Not imported: it takes a while, and is loaded if it was raised.
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(f"{path} cannot be written: {error}") from error


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
        with _writing(path):
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
        with _writing(path):
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
    temporaries = {name: _temporary_name(folder / name) for name in names}
    try:
        for name, temporary in temporaries.items():
            mode = (folder / name).stat().st_mode
            write(name, temporary)
            _sync(temporary, mode)
        write_json(folder / PENDING, {name: temporary.name for name, temporary in temporaries.items()})
    except BaseException:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    finish_pending(folder)


def finish_pending(folder: str | os.PathLike) -> None:
    """Completes what ``replace_together`` began in a folder before it was killed; nothing if there is nothing.

    ValueError if the folder's list of files is not one that ``replace_together`` writes.
    """
    path = Path(folder) / PENDING
    if not path.is_file():
        return
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if isinstance(names, list):
        # Earlier versions wrote the names alone.
        names = {name: f".{name}.pending" for name in names} if all(isinstance(name, str) for name in names) else None
    if not isinstance(names, dict) or any(
        not isinstance(item, str) or Path(item).name != item for pair in names.items() for item in pair
    ):
        raise ValueError(f"{path} is damaged: expected names of files and of their new contents")
    for name, temporary in names.items():
        if (path.parent / temporary).is_file():
            os.replace(path.parent / temporary, path.parent / name)
    path.unlink(missing_ok=True)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends a record to a JSON lines file."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
