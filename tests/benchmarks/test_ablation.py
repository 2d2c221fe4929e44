"""Intervals, paired differences and frontiers against scipy and by hand; tables, files and plots of a study."""

import csv
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from pecker_fast.benchmarks.studies.ablation import (
    COST,
    FIGURES,
    TIME,
    AblationRun,
    Results,
    fluctuation,
    pooled,
    read_ablation,
)
from pecker_fast.benchmarks.studies.ablation_report import write_ablation
from pecker_fast.benchmarks.studies.intervals import Frontier
from PIL import Image
from scipy import stats

from pecker_fast.metrics.intervals import interval, paired
from pecker_fast.report import RunRecord
from tests.report.test_render import check_page


def a_run(condition: str, seed: int, time: float | None, cost: float, pair: str = "0-1", factor: str = "f", **more):
    figures = {key: None for key in FIGURES} | {TIME: time, COST: cost} | more
    curves = {"ua": [[10, 50.0], [20, 99.0]], COST: [[20, cost]], "retain_accuracy": [], "cover_frechet_distance": []}
    return AblationRun("digits", pair, condition, factor, seed, 100, figures, curves)


def test_intervals_equal_students_t():
    values = [random.gauss(3, 2) for _ in range(6)]
    result = interval(values)
    low, high = stats.t.interval(0.95, 5, loc=np.mean(values), scale=stats.sem(values))
    assert (result.mean, result.low, result.high) == pytest.approx((np.mean(values), low, high))
    assert result.count == 6 and interval([]) is None
    assert interval([2.0]).low is None and interval([2.0]).side == 0
    assert interval([1.0, 1.1, 0.9]).side == 1 and interval([-1.0, 0.5]).side == 0
    assert interval([-1.0, -1.1, -0.9]).side == -1
    assert interval([1.0, 3.0], censored=1).text("{:.0f}".format).startswith("≥ 2 (")
    assert interval([1.0]).text("{:.1f}".format) == "1.0"


def test_paired_differences_equal_a_paired_t_test():
    seeds = range(5)
    a = {seed: random.gauss(0, 5) for seed in seeds}
    b = {seed: a[seed] + random.gauss(1, 0.1) for seed in seeds}
    result = paired(b, a)
    expected = stats.ttest_rel(list(b.values()), list(a.values())).confidence_interval(0.95)
    assert (result.low, result.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    # Seeds that either side lacks are left out, in any order.
    result = paired({3: 1.0, 1: 2.0, 2: None, 7: 5.0}, {1: 1.0, 2: 1.0, 3: 3.0})
    assert result.count == 2 and result.mean == pytest.approx(-0.5)


def test_frontier_is_interpolated_and_constant_beyond_its_ends():
    points = [(30.0, 1.0), (10.0, 3.0), (20.0, 4.0), (20.0, 2.0), (25.0, 2.5), (40.0, 1.0), (None, 0.0), (5.0, None)]
    random.shuffle(points)
    frontier = Frontier.of(points)
    # (20, 4), (25, 2.5) and (40, 1) do not dominate each other.
    assert frontier.xs == (10.0, 20.0, 30.0) and frontier.ys == (3.0, 2.0, 1.0)
    for x in (0.0, 10.0, 12.5, 20.0, 22.0, 29.9, 30.0, 99.0):
        assert frontier.cost(x) == pytest.approx(np.interp(x, frontier.xs, frontier.ys))
    assert Frontier.of([(None, 1.0)]) is None


def test_fluctuation_starts_at_the_first_high_evaluation():
    def records(*ua):
        return [{"ua": value} for value in ua]

    assert fluctuation(records(0, 50, 98, 91, 100)) == 9
    assert fluctuation(records(98)) == 0 and fluctuation(records(97, None)) is None and fluctuation([]) is None


def some_results():
    runs = [a_run("sfd 0.1", s, 40.0 + s, 1.0 + s) for s in range(3)]
    runs += [a_run("sfd 0.5", s, 20.0 + s, 3.0 + s) for s in range(3)]
    runs += [a_run("m", s, t, 1.5 + s) for s, t in enumerate((30.0, 15.0, None))]
    runs += [a_run("nothing", s, None, 0.5) for s in range(3)]
    return runs


def test_excess_uses_the_frontier_of_the_same_seed():
    results = Results(some_results(), "m", ["sfd 0.1", "sfd 0.5"], "nothing")
    # Seed 0: halfway between (20, 3) and (40, 1). Seed 1: sooner than both, so minus 4. Seed 2 never gets there.
    assert results.excess_of_seeds("m") == {0: pytest.approx(1.5 - 2.0), 1: pytest.approx(2.5 - 4.0)}
    assert results.faster_than_frontier("m") == 1
    # A setting of the frontier is compared with the other settings, not with itself.
    assert results.excess_of_seeds("sfd 0.5") == {s: pytest.approx(2.0) for s in range(3)}
    result = results.mean("m", TIME)
    assert result.censored == 1 and result.mean == pytest.approx((30 + 15 + 100) / 3)
    # A seed without a time is no pair.
    assert results.against_default("sfd 0.1", TIME).count == 2
    assert results.against_default("sfd 0.1", COST).mean == pytest.approx(-0.5)
    assert results.against_reference("m").mean == pytest.approx(2.0) and results.against_reference("m").count == 3


def test_pairs_are_pooled_by_pair_and_seed():
    one = Results([a_run("a", 0, 1, 1.0), a_run("b", 0, 1, 3.0)], "a", [], "n")
    two = Results([a_run("a", 0, 1, 10.0), a_run("b", 0, 1, 11.0), a_run("b", 1, 1, 0.0)], "a", [], "n")
    result = pooled([one, two], "b", "a", COST)
    assert result.count == 2 and result.mean == pytest.approx(1.5)


def write(folder, runs):
    names = {"asked": "What?", "command": "python -m studies", "default": "m", "reference": "nothing"}
    return write_ablation(folder, runs, frontier=["sfd 0.1", "sfd 0.5"], **names)


def test_report_files(tmp_path):
    runs = some_results() + [replace(run, pair="3-8") for run in some_results() if run.seed < 2]
    report = write(tmp_path / "study", runs)
    text = report.read_text()
    assert "\npython -m studies\n" in text and "What?" in text
    assert "## digits, 0 forgotten, with cover 1" in text and "## All pairs together" in text
    # A seed that never forgot is marked in the mean and beside it.
    row = next(line for line in text.splitlines() if line.startswith("| m | 3 |"))
    assert "≥ 48 (" in row and "1 never" in row
    # A star marks a difference whose interval excludes 0; in Markdown it is escaped.
    page = check_page((report.parent / "report.html").read_text())
    assert page.tags.count("figure") == 2 and "-0.50 (-0.50 to -0.50) *" in page.text and "\\*" in text
    assert "minus m on the same seed:" in text and "drift over it" in page.text
    for name in ("frontier.png", "curves.png"):
        assert min(Image.open(report.parent / name).size) > 300
    assert read_ablation(report.parent / "runs.jsonl") == runs
    with open(report.parent / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(runs) and lines[0][COST] == "1" and lines[-1][TIME] == ""
    summary = json.loads((report.parent / "summary.json").read_text())
    assert [result["pair"] for result in summary["pairs"]] == ["0-1", "3-8"]
    row = next(row for row in summary["pairs"][0]["conditions"] if row["condition"] == "sfd 0.5")
    assert row["less_default"][COST]["mean"] == pytest.approx(1.5) and row["seeds"] == [0, 1, 2]


def test_one_run_makes_a_report_without_intervals(tmp_path):
    text = write(tmp_path, [a_run("m", 0, 20.0, 1.0)]).read_text()
    assert "| m | 1 | 20 |" in text


def test_wrong_inputs(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        write(tmp_path, [])
    with pytest.raises(ValueError, match="expected a file of runs"):
        read_ablation(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="is no runs"):
        read_ablation(tmp_path / "other.jsonl")


def test_read_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.json").write_text(json.dumps({"seed": 4, "images": 30, "ua": 99.0, "parameter_change": 0.02}))
    lines = [{"step": i, "images": 10 * i, "ua": ua} for i, ua in ((1, 0.0), (2, 98.5), (3, 99.0))]
    lines[1][COST] = 0.123456
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    masks = [{"mask_density": 0.5, "mask_iou": iou, "mask_touched_ever": 0.6} for iou in (None, 0.5, 0.7)]
    masks = [{**mask, "mask_density_by_module": {}} for mask in masks]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in masks))
    run = AblationRun.read(tmp_path, condition="c", factor="f", preset="digits", pair="0-1", drift=0.25)
    assert RunRecord.read(tmp_path).metrics["seed"] == run.seed == 4
    assert run.figures[TIME] == 20 and run.figures["ua_fluctuation"] == 0.5 and run.figures["drift"] == 0.25
    assert run.figures["mask_iou"] == pytest.approx(0.6) and run.figures["reached"] == pytest.approx(60)
    assert run.figures["parameter_change"] == pytest.approx(2) and run.figures["diversity"] is None
    assert run.curves["ua"] == [[10, 0.0], [20, 98.5], [30, 99.0]] and run.curves[COST] == [[20, 0.1235]]
