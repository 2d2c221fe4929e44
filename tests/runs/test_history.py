"""history.jsonl: when a run was started, resumed and ended, by which command and code."""

import datetime
import subprocess
import sys
from pathlib import Path

from pecker_fast import __version__, environment
from pecker_fast.environment import code_commit
from pecker_fast.records import read_lines
from pecker_fast.runs.audit import HASHED
from pecker_fast.runs.folder import RUN_FILES
from pecker_fast.runs.history import HISTORY, record_event, started_words


def test_events(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pecker-fast", "unlearn", "--seed", "3"])
    assert started_words(["unlearn"]) == ["unlearn", "--seed", "3"] and started_words(["distil", "x"]) == [
        "distil",
        "x",
    ]
    record_event(tmp_path, "started", 0, started_words(["unlearn"]))
    record_event(tmp_path, "ended", 40)
    first, last = read_lines(tmp_path / HISTORY)
    assert first["command"] == ["pecker-fast", "unlearn", "--seed", "3"] and "command" not in last
    assert (first["event"], first["step"], last["event"], last["step"]) == ("started", 0, "ended", 40)
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(last["date"])
    assert abs(age.total_seconds()) < 600 and last["version"] == __version__ and last["commit"] == code_commit()
    # It is removed with a run that is overwritten, and hashed.
    assert HISTORY in RUN_FILES and HISTORY in HASHED


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    file = tmp_path / "package" / "environment.py"
    file.parent.mkdir()
    file.write_text("1")
    monkeypatch.setattr(environment, "__file__", str(file))
    code_commit.cache_clear()
    try:
        # An installation is not the checkout that it happens to lie in.
        assert code_commit() is None
        git("init", "-q")
        git("add", ".")
        git("commit", "-q", "-m", "x")
        commit = git("rev-parse", "HEAD")
        code_commit.cache_clear()
        assert code_commit() == commit and Path(__file__).is_file()
        file.write_text("2")
        code_commit.cache_clear()
        assert code_commit() == f"{commit}-modified"
    finally:
        code_commit.cache_clear()
