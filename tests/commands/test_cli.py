"""The command line as a user meets it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pecker_fast.benchmarks import memory
from pecker_fast.cli import main
from tests import processes
from tests.commands.case import ROOT, fails


def test_env_prints_versions_and_reasons(capsys):
    # In a separate process, as a user runs it, without the Triton interpreter that the other tests enable.
    process = processes.run(["-m", "pecker_fast", "env", "--json"])
    facts = json.loads(process.stdout)
    assert facts["backends"]["cpu"]["reference"] is None
    assert facts["backends"]["cpu"]["cuda"]
    assert set(facts["chosen"]["cpu"].values()) <= {"cpu", "reference"}
    main(["env"])
    text = capsys.readouterr().out
    assert "torch" in text and "reference" in text and "chosen" in text


def test_bench_writes_json(tmp_path, capsys, monkeypatch):
    def measured(command: list[str], **options) -> subprocess.CompletedProcess:
        """The benchmark takes a fresh interpreter for each figure of memory; a fork is as good here."""
        return processes.run(command[1:], env=options["env"])

    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=measured))
    path = tmp_path / "out.json"
    # All operations run in the tests of the benchmarks.
    names = ["saliency_mask_memory", "masked_adam"]
    quick = ["--size", "tiny", "--threads", "1", "--repeats", "3", "--max-seconds", "0.05"]
    main(["bench", *names, *quick, "--json", str(path)])
    results = json.loads(path.read_text())
    assert {row["op"] for row in results["rows"]} == {*names} and {"conditions", "rows"} <= set(results)
    assert results["conditions"]["packages"]["torch"]
    for row in results["rows"]:
        assert row["number"] >= 0
    out = capsys.readouterr().out
    assert all(row["figure"] in out for row in results["rows"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["demo", "--forget-class", "12", "--output-dir", "/tmp/never-written"],
        ["unlearn", "--preset", "no-such-preset"],
        ["unlearn", "--method", "no-such-method"],
        ["unlearn", "--density", "much"],
        ["unlearn", "--no_such_option"],
        ["bench", "no_such_operation", "--size", "tiny"],
        ["bench", "--size", "gigantic"],
        ["bench", "--size", "tiny", "--json", "/no/such/folder/out.json"],
    ],
)
def test_wrong_input_is_one_line_and_status_2(capsys, monkeypatch, arguments):
    # Otherwise bench would report that Triton is interpreted.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fails(capsys, *arguments).startswith("pecker-fast: ")


def test_error_names_the_option(capsys):
    error = fails(capsys, "unlearn", "--no_such_option", "3")
    assert error == "pecker-fast: Unrecognized options: --no_such_option, 3 (see pecker-fast unlearn --help)"
    assert "--density: no type matching {None}|FLOAT" in fails(capsys, "unlearn", "--density", "much")


def test_wrong_input_of_a_process():
    command = [sys.executable, "-m", "pecker_fast", "unlearn", "--density", "much"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    lines = [line for line in process.stderr.splitlines() if "CUDA runtime" not in line]
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("pecker-fast: "), process.stderr
