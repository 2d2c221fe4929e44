"""Several methods over several seeds: means, spreads, and missing figures."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from PIL import Image

from pecker_fast.report import RunRecord, across, read_across, text_table, write_across
from pecker_fast.report.across import figures, mean_and_spread
from pecker_fast.report.files import images_to_forget


def run(path: Path, ua: list[float], distance: float, seed: int = 0, **more) -> RunRecord:
    evaluations = [
        {"step": i, "images": 10 * i, "seconds": i / 2, "ua": value, "retain_accuracy": 90.0, "frechet_distance": 2 / i}
        for i, value in enumerate(ua, 1)
    ]
    metrics = {"seed": seed, "ua": ua[-1], "frechet_distance": distance, "seconds": 7.0, "feature_extractor": "small"}
    return RunRecord(path, {"method": "m"}, {**metrics, **more}, [], evaluations)


def test_forgetting_must_last():
    def records(*ua):
        return [{"images": 10 * i, "ua": value} for i, value in enumerate(ua, 1)]

    assert images_to_forget(records(50, 98, 100)) == 20
    assert images_to_forget(records(99, 50, 98)) == 30
    assert images_to_forget(records(99, 100, 97.9)) is None
    assert images_to_forget([{"images": 1, "ua": None}]) is None and images_to_forget([]) is None


def test_means_and_spreads():
    assert mean_and_spread([1.0, None, 4.0]) == (2.5, pytest.approx(statistics.stdev([1, 4])), 2)
    assert mean_and_spread([3.0]) == (3.0, None, 1) and mean_and_spread([None]) is None


def test_the_table_and_the_files(tmp_path):
    runs = {
        "a": [run(tmp_path, [50, 98, 100], 1.0, 0, frechet_real_split=0.5), run(tmp_path, [99, 50, 90], 3.0, 1)],
        "b": [run(tmp_path, [100.0], 2.0, 0), run(tmp_path, [100.0], 2.0, 1)],
    }
    table = text_table(runs)
    head, first, second = table.splitlines()
    assert "2.00 ± 1.41" in first and "95.0 ± 7.1" in first
    # A figure of one seed in two is marked: it is not the method's mean.
    assert "20 (1 of 2)" in first and "2.00 (1 of 2)" in first
    assert "2.00 ± 0.00" in second and "retained (%)" not in head and "UA (%)" in head
    facts = {"a": {"data-free": "yes"}, "b": {"data-free": "no"}}
    report = write_across(tmp_path, runs, asked="Forget 0.", command="pecker-fast compare", facts=facts)
    text = report.read_text()
    assert "| a | yes |" in text and "seeds 0, 1" in text and "\npecker-fast compare\n" in text
    assert "FID" not in text
    # Every column is explained, with its unit and which way is better.
    assert "| UA (%) | Unlearning accuracy | higher |" in text and "| time (s) | Training time | lower |" in text
    with open(tmp_path / "compare.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["method"], line["seed"]) for line in lines] == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    assert lines[0]["frechet_over_real"] == "2.0" and lines[1]["images_to_forget"] == ""
    compared = json.loads((tmp_path / "compare.json").read_text())
    assert compared["methods"]["a"][1]["frechet_distance"] == 3.0
    assert Image.open(tmp_path / "report.png").size[0] > 1000


def test_figures_of_a_masked_run(tmp_path):
    log = [{"mask_density": 0.5, "mask_touched_ever": 0.75}]
    masked = RunRecord(tmp_path, {}, {"peak_memory_bytes": 2**30}, log, [])
    result = figures(masked)
    assert result["reached"] == 75 and result["peak_memory_gib"] == 1 and result["ua"] is None
    # Without a mask: the share of trained parameters, if it was recorded.
    assert figures(run(tmp_path, [1.0], 1.0))["reached"] is None
    assert figures(run(tmp_path, [1.0], 1.0, parameters_trained=8.7))["reached"] == 8.7


def draw(monkeypatch, runs, **options):
    """The figure that ``draw_across`` draws for runs."""
    figures = []
    monkeypatch.setattr(across, "save_figure", lambda figure, _path: figures.append(figure))
    across.draw_across(runs, Path("report.png"), **options)
    return figures[0]


def lines_of(panel, label: str) -> list[list[float]]:
    (line,) = [line for line in panel.lines if line.get_label() == label]
    return [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]


def test_curves_are_averaged_at_equal_numbers_of_images(monkeypatch):
    def measured(seconds: float, **ua: float) -> RunRecord:
        places = {int(name[1:]): value for name, value in ua.items()}
        lines = [{"images": n, "seconds": seconds * n, "ua": value} for n, value in places.items()]
        return RunRecord(Path("r"), {}, {}, [], lines)

    # One run was also measured half-way, the other twice as often near its end.
    runs = {"a": [measured(1, n50=40.0, n100=90.0), measured(3, n90=0.0, n100=100.0, n110=math.nan)]}
    # Never at the same number of images, so there is no mean.
    runs["b"] = [measured(1, n10=1.0), measured(1, n20=2.0)]
    figure = draw(monkeypatch, runs)
    # Only UA was measured, so there is nothing else to draw.
    images, seconds = figure.axes
    assert lines_of(images, "a") == [[100], [95]] and lines_of(seconds, "a") == [[200], [95]]
    assert all(math.isnan(value) for place in lines_of(images, "b") for value in place)
    # Every run is drawn by itself, with its own seconds.
    single = [[*map(float, line.get_xdata())] for line in seconds.lines if line.get_label().startswith("_")]
    assert single == [[50, 100], [270, 300], [10], [20]]


def test_report_without_times(tmp_path, monkeypatch):
    runs = {"a": [run(tmp_path, [50.0, 100.0], 1.0)]}
    # The distance to the cover class was not measured.
    assert len(draw(monkeypatch, runs).axes) == 6 and len(draw(monkeypatch, runs, seconds=False).axes) == 3
    monkeypatch.undo()
    assert "| time (s) |" in write_across(tmp_path, runs, asked="", command="").read_text()
    assert "time (s)" not in write_across(tmp_path, runs, asked="", command="", seconds=False).read_text()
    assert "time (s)" in text_table(runs) and "time (s)" not in text_table(runs, seconds=False)
    assert json.loads((tmp_path / "compare.json").read_text())["methods"]["a"][0]["seconds"] == 7


def test_report_is_rebuilt_from_json(tmp_path):
    masked = run(tmp_path, [50.0, 100.0], 1.0, frechet_real_split=0.5, peak_memory_bytes=2**30)
    masked.log.append({"mask_density": 0.5, "mask_touched_ever": 0.75})
    runs = {"a": [masked, run(tmp_path, [99.0], 3.0, 1)], "b": [run(tmp_path, [1.0], 2.0, parameters_trained=9.0)]}
    facts = {"a": {"data-free": "yes"}, "b": {"data-free": "no"}}
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    write_across(first, runs, asked="Forget 0.", command="pecker-fast compare", facts=facts)
    read, arguments = read_across(first / "compare.json")
    write_across(second, read, **arguments)
    for name in ("compare.json", "compare.csv", "report.md", "report.html", "report.png"):
        assert (second / name).read_bytes() == (first / name).read_bytes(), name
    assert "| 75.0 (1 of 2) |" in (second / "report.md").read_text()
    for text in ("[]", "{}", '{"methods": {"a": [{}]}, "asked": "", "command": "", "facts": {}}', "x"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=r"expected compare\.json"):
            read_across(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"expected compare\.json"):
        read_across(tmp_path / "none.json")
