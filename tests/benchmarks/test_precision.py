"""The study of bfloat16 against float32: its arithmetic, and a run so short that its figures mean nothing."""

import json
import statistics

import pytest
from pecker_fast.benchmarks.studies import precision


def test_agreement():
    def row(kind, *losses):
        return {"mixed_precision": kind, "losses": {"loss_a": list(losses)}}

    rows = [row("no", 1.0, 2.0), row("bf16", 1.5, 2.0), row("no", 3.0, 6.0), row("bf16", 3.0, 5.0)]
    spread = (statistics.stdev([1, 3]) + statistics.stdev([2, 6])) / 2
    expected = {"difference": pytest.approx(1.5 / 4), "spread": pytest.approx(spread), "within": True}
    assert precision.agreement(rows) == {"loss_a": expected}


def test_command_writes_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "SAMPLES_PER_CLASS", 2)
    path = tmp_path / "out.json"
    assert precision.main(["--seeds", "0", "1", "--iterations", "1", "--device", "cpu", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["study"] == "precision" and result["conditions"]
    kinds = [(row["seed"], row["mixed_precision"]) for row in result["rows"]]
    assert kinds == [(0, "no"), (0, "bf16"), (1, "no"), (1, "bf16")]
    # The same random numbers, so that the two precisions differ by rounding only.
    full, half = (row["losses"]["loss_score_retain"][0] for row in result["rows"][:2])
    assert full != half and half == pytest.approx(full, rel=0.05)
    assert "loss_score_retain" in capsys.readouterr().out
