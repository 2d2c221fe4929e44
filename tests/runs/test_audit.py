"""Hashes and later figures of a run: metrics.json changes through one door, and the audit knows it."""

import json

import pytest

from pecker_fast.runs.audit import add_measurements, changed_files, record_hashes, update_metrics
from tests.report.test_report import make_prompt_run, make_run


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(params=["classes", "prompts"])
def run(request, tmp_path):
    folder = (make_run if request.param == "classes" else make_prompt_run)(tmp_path / "run")
    record_hashes(folder)
    return folder


def test_later_figures_are_no_change_by_somebody_else(run):
    (run / "report.md").write_text("to be refreshed")
    add_measurements(run, {"fid": 12.25}, {"seed": 1}, "evaluation")
    assert metrics_of(run)["fid"] == 12.25 and changed_files(run) == []
    assert "| FID | 12.25 |" in (run / "report.md").read_text()
    (run / "metrics.json").write_text(json.dumps({**metrics_of(run), "fid": 1.0}))
    assert changed_files(run) == ["metrics.json"]
    # A change by somebody else stays visible.
    update_metrics(run, {**metrics_of(run), "kid": 0.5})
    assert changed_files(run) == ["metrics.json"] and "CHANGED" in (run / "report.md").read_text()


def test_an_evaluation_replaces_the_earlier_one_of_its_name(run):
    seconds = metrics_of(run)["seconds"]
    environment = {"packages": {"torch": "2"}, "machine": "this"}
    first = {"gcd_score": 0.5, "no_face_share": 0.25, "seconds": -1.0, "near_gcd_score": None}
    add_measurements(run, first, {"detectors": "a", "environment": environment}, "concept")
    add_measurements(run, {"fid": 3.0}, {"seed": 1}, "evaluation")
    metrics = metrics_of(run)
    # What the run itself measured stays.
    assert (metrics["gcd_score"], metrics["seconds"], metrics["fid"]) == (0.5, seconds, 3.0)
    protocol = metrics["protocol"]["concept"]
    assert protocol["measured"] == ["gcd_score", "no_face_share", "near_gcd_score"]
    assert protocol["packages"] == {"torch": "2"} and "environment" not in protocol
    add_measurements(run, {"gcd_score": 0.125, "model": "/home/me/net"}, {"detectors": "/home/me/b"}, "concept")
    metrics = metrics_of(run)
    assert metrics["gcd_score"] == 0.125 and "no_face_share" not in metrics and metrics["fid"] == 3.0
    assert metrics["model"] == "net" and metrics["protocol"]["concept"]["detectors"] == "b"
    assert set(metrics["protocol"]) == {"concept", "evaluation"}


def test_figures_of_earlier_versions_are_replaced(run):
    (run / "metrics.json").write_text(json.dumps({**metrics_of(run), "gcd_score": 0.5, "protocol": {"concept": {}}}))
    add_measurements(run, {"gcd_score": 0.75}, {}, "concept")
    assert metrics_of(run)["gcd_score"] == 0.75


def test_without_a_run_nothing_is_written(tmp_path):
    add_measurements(tmp_path, {"fid": 1.0}, {}, "evaluation")
    assert list(tmp_path.iterdir()) == []
