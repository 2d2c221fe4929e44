"""Files that are whole or not there."""

import json
import os
import resource
import signal
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pecker_fast.files import (
    HOST,
    append_line,
    clear_leftovers,
    finish_pending,
    is_alive,
    replace_together,
    replacing,
    save_tensors,
    write_folder,
    write_json,
    write_text,
)
from pecker_fast.records import read_lines
from tests.test_locks import dead_process


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def mode_of_new_files() -> int:
    """New files have the permissions of the user's umask, like those of any program."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_text(path, "old")
    with pytest.raises(OSError, match="full"), replacing(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old" and names(tmp_path) == ["f"]
    # A file whose bytes have not reached the disk does not either.
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("lost")))
    for write in (lambda: write_json(path, 1), lambda: save_tensors(path, {"a": torch.ones(2)})):
        with pytest.raises(OSError, match="lost"):
            write()
    with pytest.raises(OSError, match="lost"):
        write_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("x"))
    assert path.read_text() == "old" and names(tmp_path) == ["f"]


def test_written_files_are_read_back(tmp_path):
    write_text(tmp_path / "t", "\u00e9\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa9\n"
    write_json(tmp_path / "j", {"a": [1, None]})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "j", {"path": tmp_path})
    assert json.loads((tmp_path / "j").read_text()) == {"a": [1, None]}
    save_tensors(tmp_path / "s", {"a": torch.arange(3)}, {"key": "value"})
    with safe_open(tmp_path / "s", "pt") as file:
        assert file.metadata() == {"key": "value"} and file.get_tensor("a").tolist() == [0, 1, 2]
    assert all(mode(tmp_path / name) == mode_of_new_files() for name in "tjs")


def test_folders(tmp_path):
    place = tmp_path / "a" / "b"
    write_folder(place, lambda folder: (folder / "x").write_text("1"))
    (place / "kept").write_text("k")

    def more(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "y").write_text("2")
        (folder / "x").write_text("3")

    write_folder(place, more)
    write_folder(place, lambda folder: save_file({"a": torch.ones(1)}, folder / "z"))
    assert mode(place / "z") == mode_of_new_files()
    (place / "z").unlink()
    assert (
        names(place) == ["inner", "kept", "x"] and (place / "x").read_text() == "3" and names(tmp_path / "a") == ["b"]
    )
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        write_folder(place / "x", more)


def test_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1})
    append_line(path, {"a": "\u00e9"})
    with open(path, "a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [{"a": 1}, {"a": "\u00e9"}]


def test_living_processes():
    assert is_alive(os.getpid()) and is_alive(1) and not is_alive(dead_process()) and not is_alive(1 << 62)


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    """Of every name that this version and earlier ones use, and nothing else."""
    dead, folder = dead_process(), tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    # As if that process had been killed.
    leftovers = [
        folder / f".metrics.json.@{HOST}.{dead}.tmp",
        folder / f".report.png.{dead}.tmp",
        folder / f"..pending.json.{dead}.tmp",
        folder / "checkpoints" / f"..checkpoint-10.tmp.@{HOST}.{dead}.tmp",
        folder / "checkpoints" / f"..checkpoint-10.tmp.{dead}.tmp",
        tmp_path / f".run.@{HOST}.{dead}.tmp",
        tmp_path / f".run.{dead}.tmp",
    ]
    old = [folder / f".a.@another-host.{dead}.tmp", folder / ".unet.safetensors.pending"]
    kept = [
        folder / "metrics.json",
        folder / f".a.@{HOST}.{os.getpid()}.tmp",
        folder / f".b.{os.getpid()}.tmp",
        folder / f".c.@another-host.{dead}.tmp",
        folder / ".d.pending",
        folder / f"e.{dead}.tmp",
        folder / ".notes.tmp",
        folder / ".hidden" / f".f.{dead}.tmp",
        tmp_path / f".runs.{dead}.tmp",
        tmp_path / f".run2.{dead}.tmp",
    ]
    for path in [*leftovers, *old, *kept]:
        path.write_text("x")
    leftovers[3].unlink()
    leftovers[3].mkdir()
    (leftovers[3] / "weights").write_text("x")
    (folder / f".link.{dead}.tmp").symlink_to(tmp_path / "outside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("x")
    for path in old:
        os.utime(path, (0, 0))
    removed = clear_leftovers(folder)
    assert {*removed} == {*leftovers, *old, folder / f".link.{dead}.tmp"}
    assert all(path.exists() for path in kept) and (tmp_path / "outside" / "mine").exists()
    assert clear_leftovers(folder) == [] == clear_leftovers(tmp_path / "none")


def test_writers_that_are_killed_leave_what_is_cleared(tmp_path):
    """Real kills, in the middle of each kind of writing."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in "cd":
        (folder / name).write_text("old")

    def half(path) -> None:
        path.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    def file() -> None:
        with replacing(folder / "a") as path:
            half(path)

    for write in (
        file,
        lambda: write_folder(folder / "b", lambda path: half(path / "x")),
        lambda: write_folder(folder, lambda path: half(path / "x")),
        lambda: replace_together(folder, ["c", "d"], lambda name, path: half(path)),
    ):
        process = os.fork()
        if process == 0:
            write()
        assert os.waitpid(process, 0)[1] == signal.SIGKILL
        left = {*names(folder)} - {"c", "d"} or {*names(tmp_path)} - {"run"}
        assert len(left) == 1
        clear_leftovers(folder)
        assert names(folder) == ["c", "d"] and names(tmp_path) == ["run"]
        assert [(folder / name).read_text() for name in "cd"] == ["old", "old"]


def test_files_that_are_replaced_together(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text("old")
    replace_together(tmp_path, ["a", "b"], lambda name, path: path.write_text(f"new {name}"))
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new a", "new b"] and names(tmp_path) == ["a", "b"]
    # Killed after the list was written, by this version and by an earlier one.
    for entries in ({"a": ".a.@host.1.tmp", "b": ".b.@host.1.tmp"}, {"a": ".a.pending", "b": ".b.pending"}):
        old = [*entries] if ".a.pending" in entries.values() else entries
        for name, temporary in entries.items():
            (tmp_path / temporary).write_text(f"newer {name}")
        (tmp_path / ".pending.json").write_text(json.dumps(old))
        clear_leftovers(tmp_path)
        assert [(tmp_path / n).read_text() for n in "ab"] == ["newer a", "newer b"] and names(tmp_path) == ["a", "b"]
    for content in ("{", "5", "[1]", '{"a": 1}', '{"../a": "b"}', '{"a": "x/y"}'):
        (tmp_path / ".pending.json").write_text(content)
        with pytest.raises(ValueError, match=r"pending\.json is damaged"):
            finish_pending(tmp_path)


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """safetensors has an error of its own, which no command line expects."""
    save_tensors(tmp_path / "s", {"a": torch.ones(2)})
    whole = (tmp_path / "s").read_bytes()
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        status = 0
        large = {"a": torch.ones(1 << 20)}
        for write in (
            lambda: save_tensors(tmp_path / "s", large),
            lambda: write_folder(tmp_path / "f", lambda folder: save_file(large, folder / "s")),
            lambda: write_text(tmp_path / "s", "x" * 5000),
        ):
            try:
                write()
            except OSError as error:
                status += len(str(error).splitlines()) == 1
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
    assert (tmp_path / "s").read_bytes() == whole and names(tmp_path) == ["s"]
