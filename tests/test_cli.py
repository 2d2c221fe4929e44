"""The command line as a user meets it."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from pecker_fast.benchmarks import memory
from pecker_fast.cli import main
from tests import processes


def run(*arguments: str) -> subprocess.CompletedProcess:
    return processes.run(["-m", "pecker_fast", *arguments])


def test_env_tells_versions_and_reasons():
    text = run("env").stdout
    assert "torch" in text and "reference" in text and "chosen" in text
    found = json.loads(run("env", "--json").stdout)
    assert found["backends"]["cpu"]["reference"] is None
    assert found["backends"]["cpu"]["cuda"]
    assert set(found["chosen"]["cpu"].values()) <= {"cpu", "reference"}


def test_bench_writes_json(tmp_path, monkeypatch):
    def measured(command: list[str], **options) -> subprocess.CompletedProcess:
        """The benchmark takes a fresh interpreter for each figure of memory; a fork is as good here."""
        return processes.run(command[1:], env=options["env"])

    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=measured))
    path = tmp_path / "out.json"
    main(["bench", "--size", "tiny", "--threads", "1", "--repeats", "3", "--max-seconds", "1", "--json", str(path)])
    results = json.loads(path.read_text())
    assert results["rows"] and {"conditions", "rows"} <= set(results)
    assert results["conditions"]["packages"]["torch"]
    for row in results["rows"]:
        assert row["number"] >= 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["demo", "--forget-class", "12", "--output-dir", "/tmp/never-written"],
        ["unlearn", "--preset", "no-such-preset"],
        ["unlearn", "--method", "no-such-method"],
        ["unlearn", "--density", "much"],
        ["bench", "no_such_operation", "--size", "tiny"],
        ["bench", "--size", "gigantic"],
        ["bench", "--size", "tiny", "--json", "/no/such/folder/out.json"],
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if "CUDA runtime" not in line]
    assert len(lines) == 1 and lines[0].startswith("pecker-fast: "), done.stderr
