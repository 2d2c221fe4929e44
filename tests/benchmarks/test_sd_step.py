"""The benchmark of iterations on Stable Diffusion, on a tiny network."""

import json

from pecker_fast.benchmarks import sd_step


def test_rows_are_measured_and_written(tmp_path, capsys):
    path = tmp_path / "out.json"
    words = ["--size", "tiny", "--batch", "2", "--images", "2", "--iterations", "2", "--device", "cpu"]
    # Of the methods, the quickest.
    words += ["--method", "sfd"]
    sd_step.main([*words, "--precision", "no", "--json", str(path)])
    results = json.loads(path.read_text())
    (row,) = results["rows"]
    assert len(row["seconds"]) == 2 and row["peak_memory_bytes"] > row["estimated_bytes"] > 0
    assert results["conditions"]["packages"]["torch"] and row["batch"] == 2
    assert "images a second" in capsys.readouterr().out
