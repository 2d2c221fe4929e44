"""Reports and committed results have no absolute paths of the machine that made them."""

import re
import sys
from pathlib import Path

import pytest

from pecker_fast.report import portable
from pecker_fast.runs.several import command_line

ABSOLUTE = re.compile(r"""(?:^|[\s"'=(:])(?:/\w[\w.-]*/|~/)[^\s"']*""", re.MULTILINE)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_only_absolute_paths_are_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, elsewhere = str(tmp_path / "runs" / "a"), str(tmp_path.parent / "someone" / "net")
    value = {
        "below": here,
        "elsewhere": elsewhere,
        "home": "~/nets/mine",
        "data": [f"folder:{elsewhere}", "folder:images"],
        "deep": {"pair": (elsewhere, None, True, 1.5)},
        "words": ["runs/a", "../b", "hub:someone/net", "UA 98 / real", "a=b", ""],
    }
    assert portable(value) == {
        "below": "runs/a",
        "elsewhere": "net",
        "home": "mine",
        "data": ["folder:net", "folder:images"],
        "deep": {"pair": ["net", None, True, 1.5]},
        "words": value["words"],
    }


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge, out = str(tmp_path.parent / "x" / "my judge.st"), str(tmp_path / "runs" / "c")
    words = ["compare", "--judge", judge, f"--output-dir={out}", "--set", "density=0.5", f"judge={judge}"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pecker-fast", *words])
    expected = "pecker-fast compare --judge 'my judge.st' --output-dir=runs/c --set density=0.5 'judge=my judge.st'"
    assert command_line("compare") == expected
    # Called from Python, or by another command.
    assert command_line("sequence", "--seed", "1") == "pecker-fast sequence --seed 1"


def test_committed_results_have_no_absolute_paths():
    files = [path for path in RESULTS.rglob("*") if path.suffix in (".json", ".jsonl", ".csv", ".md", ".html")]
    assert len(files) > 8
    for path in files:
        match = ABSOLUTE.search(path.read_text(encoding="utf-8"))
        assert match is None, f"{path.relative_to(RESULTS)}: {match[0]}"


@pytest.mark.parametrize("text", ['"pretrained": "/home/me/net"', "data_root=/mnt/x/y", "see ~/runs/z", "folder:/a/b"])
def test_search_detects_absolute_paths(text):
    assert ABSOLUTE.search(text) and not ABSOLUTE.search("| / real | s / image | a/b/c | ../x/y | 1/2/3 |")
