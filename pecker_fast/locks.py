"""Locks: at most one process writes the folder of a run.

The lock of the operating system on the file ``.lock`` decides. It ends with its process, however that ends, and is not
inherited by child processes. Most network file systems share it between machines. Some do not, so the holder also
touches the file as a sign of life: before the lock of another machine is taken over, the file is watched for a while.
"""

import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from .files import clear_leftovers, is_alive
from .records import COUNT, RecordError, parse_object

NAME = ".lock"
# Seconds between signs of life of a holder.
BEAT = 10.0
# Seconds to wait for the lock for a change that takes a moment, such as adding figures to a run.
PATIENCE = 30.0
# Signs of life that a holder on another machine may miss before its lock is taken over.
MISSED = 3
_UNSUPPORTED = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
# Folders that this process has locked, since the system's lock does not exclude the process that has it.
_held: set[str] = set()
_guard = threading.Lock()


class LockedError(ValueError):
    """Another process is writing the folder."""


class Holder(TypedDict):
    """The content of a lock file."""

    pid: COUNT
    host: str
    since: str


@contextmanager
def locked(folder: str | os.PathLike, patience: float = 0.0) -> Iterator[None]:
    """Holds the lock of a folder, which must exist, and removes its file at the end.

    What killed processes were writing there is removed first: some of it nobody else would look for.

    Parameters
    ----------
    folder : path-like
        The folder.
    patience : float
        Seconds to wait for another process to finish.

    Raises
    ------
    LockedError
        If another process, or another thread of this one, is writing the folder; the message names it.
    OSError
        If the lock file cannot be written.
    """
    path = Path(folder).resolve() / NAME
    until = time.monotonic() + patience
    while True:
        try:
            descriptor = _take(path)
            break
        except LockedError:
            if time.monotonic() >= until:
                raise
            time.sleep(min(0.2, patience))
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, stop), daemon=True, name="lock of a run's folder")
    try:
        beat.start()
        clear_leftovers(folder)
        yield
    finally:
        stop.set()
        if beat.ident is not None:
            beat.join()
        _release(path, descriptor)


def _take(path: Path) -> int:
    """The descriptor of the locked file. LockedError if somebody else has it."""
    with _guard:
        if str(path) in _held:
            raise LockedError(_refusal(path, _words(_own())))
        _held.add(str(path))
    descriptor, own = -1, False
    try:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            taken = _lock(descriptor)
            if taken is False or (taken is None and _is_living(_read(descriptor))):
                raise LockedError(_refusal(path, _words(_read(descriptor))))
            if not _is_same(path, descriptor):
                # Its holder removed the file in the meantime.
                os.close(descriptor)
                descriptor = -1
                continue
            _wait_for_another_machine(path, _read(descriptor))
            own = True
            content = json.dumps(_own()).encode()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
            os.fsync(descriptor)
            return descriptor
    except BaseException:
        # Such as Ctrl-C, or a full disk.
        if own:
            _release(path, descriptor)
            raise
        if descriptor >= 0:
            os.close(descriptor)
        with _guard:
            _held.discard(str(path))
        raise


def _release(path: Path, descriptor: int) -> None:
    try:
        if _is_same(path, descriptor):
            path.unlink(missing_ok=True)
    except OSError:
        # For example if the folder has become read-only; the lock itself ends with the descriptor.
        pass
    finally:
        os.close(descriptor)
        with _guard:
            _held.discard(str(path))


def _lock(descriptor: int) -> bool | None:
    """Take the system's lock; False if another process has it, None if the file system has no locks."""
    try:
        # A lock of the process: children that outlive it, such as loaders of data, do not hold it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_same(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is still the file of the descriptor."""
    try:
        there, own = os.stat(path), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _own() -> Holder:
    return {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _read(descriptor: int) -> Holder | None:
    """Who wrote the lock file; None if nobody has, or it is damaged."""
    try:
        return parse_object(os.pread(descriptor, 4096, 0), Holder, NAME)  # type: ignore[return-value]
    except RecordError:
        return None


def _is_living(holder: Holder | None) -> bool:
    """Whether a holder on this machine is alive; those of other machines are watched instead."""
    return (
        holder is not None
        and holder["host"] == platform.node()
        and holder["pid"] != os.getpid()
        and is_alive(holder["pid"])
    )


def _wait_for_another_machine(path: Path, holder: Holder | None) -> None:
    """Return when the holder on another machine has shown no life for long enough. LockedError if it shows any."""
    if holder is None or holder["host"] == platform.node():
        return
    before = _touched(path)
    wait = f"waiting {MISSED * BEAT:.0f} s to see whether it runs"
    print(f"{path.parent} was last written by {_words(holder)}: {wait}", file=sys.stderr)
    until = time.monotonic() + MISSED * BEAT
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT))
        if _touched(path) != before:
            raise LockedError(_refusal(path, _words(holder)))


def _touched(path: Path) -> int:
    # Network file systems look at the file itself, not at their cache, when it is opened. Not by this process: to close
    # any descriptor of the file would end its lock.
    return os.stat(path).st_mtime_ns


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        try:
            os.utime(descriptor)
        except OSError:
            return


def _words(holder: Holder | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _refusal(path: Path, holder: str) -> str:
    return f"output_dir {path.parent} is being written by {holder}: wait for it or stop it, or choose another folder"
