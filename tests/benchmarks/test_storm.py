"""The storms: cases are drawn from their numbers, results are continued, faults are named."""

import json
import random
from collections import Counter

import pytest

from pecker_fast.benchmarks import storm


def test_results_are_continued(tmp_path, monkeypatch):
    drawn = []

    def fake(place, draw) -> dict[str, int]:
        assert (place / "network" / "config.json").is_file()
        drawn.append(draw.random())
        if len(drawn) == 2:
            raise storm.WrongError("lost")
        return {"good": 2}

    monkeypatch.setattr(storm, "STORMS", {"fake": fake})
    path = tmp_path / "new" / "a.json"
    storm.run(path, 3, ["fake"], lambda line: None)
    row = json.loads(path.read_text())["storms"]["fake"]
    assert row == {"cases": 3, "counts": {"good": 4}, "wrong": ["case 1: lost"]}
    results = storm.run(path, 5, ["fake"], lambda line: None)
    assert len(drawn) == 5 and results["storms"]["fake"]["counts"] == {"good": 8}
    assert drawn == [random.Random(f"fake {number}").random() for number in range(5)]
    with pytest.raises(SystemExit) as stop:
        monkeypatch.setattr("sys.argv", ["storm"])
        storm.main(["--json", str(path), "--cases", "5"])
    assert stop.value.code == 1


def test_damage_changes_bytes():
    content = bytes(range(256)) * 4
    changed = [storm.damaged(content, random.Random(number)) for number in range(60)]
    assert sum(x != content for x in changed) > 50 and {len(x) < len(content) for x in changed} == {True, False}


def test_damaged_files_of_a_run(tmp_path, monkeypatch):
    """One short storm over all kinds of files of a real run."""
    path = tmp_path / "a.json"
    monkeypatch.setattr(storm, "STORMS", {"files": lambda place, draw: storm.files(place, draw, 4)})
    row = storm.run(path, 1, ["files"], lambda line: None)["storms"]["files"]
    assert row["wrong"] == []
    counts = Counter(row["counts"])
    assert all(counts[f"{kind}_refused"] for kind in storm.HASHED)
    assert not any(counts[f"{kind}_read"] for kind in storm.HASHED)


def test_a_reader_that_accepts_damage_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "mask").write_bytes(b"content")
    for read, message in ((lambda: None, "changed content was read"), (lambda: {}["x"], "KeyError")):
        monkeypatch.setattr(storm, "readers", lambda place, read=read: {"mask": (tmp_path / "mask", read)})
        with pytest.raises(storm.WrongError, match=message):
            storm.files(tmp_path, random.Random(0))
        assert (tmp_path / "mask").read_bytes() == b"content"
