"""Hashes and later figures of a run: one function changes metrics.json, and the audit accepts its changes."""

import json

import pytest

from pecker_fast.runs.audit import changed_files, record_hashes, update_metrics
from tests.report.test_report import make_prompt_run, make_run


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(params=["classes", "prompts"])
def run(request, tmp_path):
    folder = (make_run if request.param == "classes" else make_prompt_run)(tmp_path / "run")
    record_hashes(folder)
    return folder


def test_later_figures_are_no_foreign_change(run):
    (run / "report.md").write_text("to be refreshed")
    update_metrics(run, {**metrics_of(run), "fid": 12.25})
    assert metrics_of(run)["fid"] == 12.25 and changed_files(run) == []
    assert "| FID | 12.25 |" in (run / "report.md").read_text()
    (run / "metrics.json").write_text(json.dumps({**metrics_of(run), "fid": 1.0}))
    assert changed_files(run) == ["metrics.json"]
    # A change by anyone else stays visible.
    update_metrics(run, {**metrics_of(run), "kid": 0.5})
    assert changed_files(run) == ["metrics.json"] and "CHANGED" in (run / "report.md").read_text()


def test_no_report_or_hashes_are_created(run):
    (run / "hashes.json").unlink()
    update_metrics(run, {**metrics_of(run), "fid": 12.25})
    assert metrics_of(run)["fid"] == 12.25
    assert not (run / "hashes.json").exists() and not (run / "report.md").exists()
