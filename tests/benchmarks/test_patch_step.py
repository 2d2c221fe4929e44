"""The benchmark of a patch's iterations runs, and reports a row for each rule."""

import json

import pytest
from pecker_fast.benchmarks.studies.patch_step import COMPARED, SFD, main


def test_rules_are_timed_in_turns(few_samples, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert main(["--rounds", "1", "--block", "1", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    rows = results["rows"]
    assert list(rows) == list(COMPARED) and results["conditions"]["threads"] == 1
    assert rows[SFD]["over_sfd"] == 1
    for row in rows.values():
        assert row["over_sfd"] == pytest.approx(row["seconds"] / rows[SFD]["seconds"])
    assert rows["patch 0.1"]["state_bytes"] < 0.15 * rows[SFD]["state_bytes"]
    output = capsys.readouterr().out
    assert all(name in output for name in COMPARED)


def test_more_iterations_than_a_run_has(capsys):
    assert main(["--rounds", "16"]) == 2 and "at most 80" in capsys.readouterr().err
