"""Costs in reports: of a result of an earlier version, which has none, and of bounds."""

import json
from pathlib import Path

from pecker_fast.report import write_robustness_report
from pecker_fast.report.relearning_cost import cost_blocks
from tests.report.test_render import check_page

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "robustness"


def test_a_result_without_costs_is_still_reported(tmp_path):
    old = json.loads((RESULTS / "pecker.json").read_text())
    assert "cost" not in old and cost_blocks(old) == []
    (tmp_path / "robustness.json").write_text(json.dumps(old))
    text = write_robustness_report(tmp_path).read_text()
    assert "What it costs" not in text and "## Relearning" in text and "## Latent search" in text
    check_page((tmp_path / "robustness.html").read_text())


def test_bounds_are_marked():
    reached = {"attack": "matching, one step", "steps": 12.25, "images": 196.0, "censored": False}
    bound = {"attack": "matching, one step", "steps": 100.0, "images": 1600.0, "censored": True}
    result = {
        "cost": {
            "networks": {"run": bound, "relabel": reached},
            "by_attack": {"run": [bound], "relabel": [reached]},
            "verdicts": {"relabel": {"text": "Later.", "relation": "later", "ratio": None}},
        },
        "protocol": {"notes": ["The control is missing."]},
    }
    verdict, note, what, table, attacks = cost_blocks(result)
    assert (verdict.text, note.text) == ("Later.", "The control is missing.") and "UA of 50 %" in what.text
    assert [list(row) for row in table.rows] == [
        ["this run", "> 100", "> 1600", "matching, one step"],
        ["relabelled: nothing is trained", "12.2", "196.0", "matching, one step"],
    ]
    assert [list(row) for row in attacks.rows] == [["matching, one step", "> 100", "12.2"]]
