"""The benchmark of patch files, on few weights."""

import json

import pytest

from pecker_fast.benchmarks import patch_files


def test_sizes_and_speeds_are_written(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert patch_files.main(["--numel", "65536", "--repeats", "1", "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [row["density"] for row in results["rows"]] == list(patch_files.DENSITIES)
    for row in results["rows"]:
        assert row["bits"]["patch"] == pytest.approx(row["entropy"], rel=0.05)
        assert row["bits"]["patch"] < min(row["bits"]["zlib"], row["bits"]["lzma"])
    assert results["apply_mb_per_second"] > 0 and "MB/s" in capsys.readouterr().out
