"""Locks of folders: one process at a time, taken over from dead ones, on file systems with and without locks."""

import fcntl
import json
import os
import platform
import signal
import threading
import time

import pytest

from pecker_fast import locks
from pecker_fast.files import HOST
from pecker_fast.locks import LockedError, locked


class Holder:
    """A process that holds the lock of a folder until it is told to end, or is killed.

    It is forked, because a process of its own would spend seconds on imports.
    """

    def __init__(self, folder, child: bool = False) -> None:
        (held, say), (listen, self._end) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._end)
            with locked(folder):
                if child and os.fork() == 0:
                    os.read(listen, 1)
                    os._exit(0)
                os.write(say, b"x")
                os.read(listen, 1)
            os._exit(0)
        os.close(listen)
        os.close(say)
        assert os.read(held, 1) == b"x"
        os.close(held)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def close(self) -> None:
        """Let the process, or the child that it left, end."""
        os.close(self._end)

    def end(self) -> None:
        self.close()
        assert os.waitpid(self.pid, 0)[1] == 0


def dead_process() -> int:
    """The number of a process that has just ended."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_one_process_at_a_time(tmp_path):
    process = Holder(tmp_path)
    with pytest.raises(LockedError) as error, locked(tmp_path):
        pass
    text = str(error.value)
    assert f"process {process.pid} on {platform.node()}" in text and len(text.splitlines()) == 1
    assert str(tmp_path) in text and isinstance(error.value, ValueError)
    process.end()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    process = Holder(tmp_path)
    process.kill()
    process.close()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid
    with locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    """As loaders of data do for a moment."""
    process = Holder(tmp_path, child=True)
    process.kill()
    with locked(tmp_path):
        pass
    process.close()


def test_threads_of_one_process(tmp_path):
    with locked(tmp_path):
        with pytest.raises(LockedError, match=f"process {os.getpid()}"), locked(tmp_path / "." / "x" / ".."):
            pass
        (tmp_path / "other").mkdir()
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path):
        pass


def test_patience(tmp_path):
    process = Holder(tmp_path)
    threading.Timer(0.5, process.close).start()
    with locked(tmp_path, patience=60):
        pass
    os.waitpid(process.pid, 0)
    process = Holder(tmp_path)
    before = time.monotonic()
    with pytest.raises(LockedError), locked(tmp_path, patience=0.5):
        pass
    assert 0.4 < time.monotonic() - before < 20
    process.end()


def write_lock(folder, **changes) -> None:
    content = {"pid": os.getpid(), "host": platform.node(), "since": "2026-01-01 00:00:00", **changes}
    (folder / ".lock").write_text(json.dumps(content))


def test_damaged_lock_files_do_not_matter(tmp_path):
    for content in (b"", b"{", b"[]", b"\0" * 99, b'{"pid": "x"}'):
        (tmp_path / ".lock").write_bytes(content)
        with locked(tmp_path):
            pass


def test_the_lock_of_another_machine_is_watched(tmp_path, monkeypatch, capsys):
    """Some network file systems share no locks between machines."""
    monkeypatch.setattr(locks, "BEAT", 0.1)
    write_lock(tmp_path, host="elsewhere", pid=7)
    with locked(tmp_path):
        pass
    assert "last written by process 7 on elsewhere" in capsys.readouterr().err
    # That machine shows life.
    write_lock(tmp_path, host="elsewhere", pid=7)
    alive = threading.Event()

    def beat() -> None:
        while not alive.wait(0.02):
            os.utime(tmp_path / ".lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LockedError, match="process 7 on elsewhere"), locked(tmp_path):
            pass
    finally:
        alive.set()
        thread.join()


def test_a_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with locked(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        until = time.monotonic() + 20
        while os.stat(tmp_path / ".lock").st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert os.stat(tmp_path / ".lock").st_mtime > 0


def test_file_systems_without_locks(tmp_path, monkeypatch):
    """The process in the file decides there."""

    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    write_lock(tmp_path, pid=os.getppid())
    with pytest.raises(LockedError, match=f"process {os.getppid()}"), locked(tmp_path):
        pass
    write_lock(tmp_path, pid=dead_process())
    with locked(tmp_path):
        pass
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pass


def test_the_file_may_vanish_or_the_folder_be_gone(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        (folder / ".lock").unlink()
    with pytest.raises(OSError, match="run"), locked(tmp_path / "none" / "run"):
        pass
    with locked(folder):
        pass


def test_a_file_that_vanishes_before_the_lock_is_taken_is_made_again(tmp_path, monkeypatch):
    """If that fails, its error is raised, no descriptor is closed twice, and the folder is free again."""
    opened, closed = [], []
    open_file, close_file = os.open, os.close

    def open_once(path, *arguments):
        if opened:
            raise PermissionError("no second file")
        opened.append(open_file(path, *arguments))
        return opened[0]

    def close(descriptor):
        closed.append(descriptor)
        close_file(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(locks.os, "open", open_once)
        patched.setattr(locks.os, "close", close)
        patched.setattr(locks, "_is_same", lambda path, descriptor: False)
        with pytest.raises(PermissionError, match="no second file"), locked(tmp_path):
            pass
    assert closed == opened
    with locked(tmp_path):
        pass


def test_ctrl_c_while_the_lock_is_taken_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # To write the file takes a while on a busy disk.
        patch.setattr(locks.os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt), locked(tmp_path):
            pass
        assert os.listdir(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt), locked(tmp_path):
            pass
        assert os.listdir(tmp_path) == []
    # The process itself is not locked out.
    with locked(tmp_path):
        pass


def test_a_refused_process_leaves_the_lock_of_another(tmp_path):
    process = Holder(tmp_path)
    with pytest.raises(LockedError), locked(tmp_path):
        pass
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid
    process.end()


def test_what_killed_processes_were_writing_is_removed(tmp_path):
    """By whoever writes the folder next: an evaluation or an attack, too, which a finished run does not repeat."""
    (tmp_path / "evaluation").mkdir()
    dead, alive = (f".report.html.@{HOST}.{pid}.tmp" for pid in (dead_process(), os.getpid()))
    for name in (dead, alive, f"evaluation/{dead}", "report.html"):
        (tmp_path / name).write_text("x")
    with locked(tmp_path):
        left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {".lock", alive, "report.html"}
