"""Files that are whole or not there."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pecker_fast.files import append_line, replacing, save_tensors, write_folder, write_json, write_text
from pecker_fast.records import read_lines


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
