"""The catalogue of figures."""

import json
from pathlib import Path

import pytest

from pecker_fast.figures import FIGURES, ROBUSTNESS, derived, describe, figure, find
from pecker_fast.report.across import CLASSES, PROMPTS

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def test_every_figure_is_complete_and_named_once():
    for key, row in FIGURES.items():
        assert row.key == key and row.label and row.short and row.meaning and row.better in ("higher", "lower", None)
        assert not row.meaning.endswith(".") and row.unit not in row.label.split()[-1:]
        assert row.number("ddim" if key == "sampler" else 1.0) and row.number(None) == row.text(None) == "-"
    for names in ("label", "title"):
        # Bytes and GiB are the same figure.
        values = [getattr(row, names) for key, row in FIGURES.items() if key != "peak_memory_gib"]
        assert len(set(values)) == len(values), names


def test_values_with_and_without_units():
    assert figure("ua").text(98.75) == "98.8 %" and figure("ua").number(98.75) == "98.8"
    assert figure("ua").number(1.0, signed=True) == "+1.0" and figure("images").number(-1234, signed=True) == "-1,234"
    assert figure("peak_memory_bytes").text(3 * 2**29) == figure("peak_memory_gib").text(1.5) == "1.50 GiB"
    assert figure("images").text(5760) == "5,760" and figure("sampler").text("one_step") == "one step"
    assert figure("seconds").title == "time (s)" and figure("seconds").axis == "Training time (s)"
    assert figure("diversity").direction == "-" and figure("fid").direction == "lower"


def test_figures_after_steps():
    row = figure("relearn_forget_ua_50")
    assert row.key == "relearn_forget_ua_50" and row.label == "UA after relearning, 50 steps" and row.unit == "%"
    assert find("relearn_nothing_50") is None and find("ua_50") is None
    with pytest.raises(KeyError, match="not in the catalogue"):
        figure("unheard_of")


def test_catalogue_covers_the_committed_results():
    demo = json.loads((RESULTS / "demo-digits.json").read_text())["methods"]["patch"]
    words = {"method", "seed", "pretrained", "protocol", "feature_extractor", "weights_sha256", "weights"}
    assert (
        figure("before_diversity").label == "Before: Diversity, retained classes (real = 1)"
        and figure("before_diversity").better is None
    )
    assert {key for key in demo if find(key) is None} == words
    summary = json.loads((RESULTS / "robustness" / "pecker.json").read_text())["summary"]
    assert all(find(key) is not None for key in summary)
    assert {key.rpartition("_")[0] if key.startswith("relearn") else key for key in summary} <= ROBUSTNESS
    for shown in (CLASSES, PROMPTS):
        for key in (*shown.columns, *shown.main, *shown.curves):
            assert figure(key).key == key


def test_derived_figures():
    metrics = {"frechet_distance": 1.5, "frechet_real_split": 0.5, "peak_memory_bytes": 2**30}
    assert derived(metrics) == {**metrics, "frechet_over_real": 3.0, "peak_memory_gib": 1.0}
    assert derived({"frechet_distance": 1.0, "frechet_real_split": 0.0}).get("frechet_over_real") is None


def test_a_terminal_shows_labels_and_units():
    lines = describe({"ua": 98.75, "weights": "ema", "fid": None, "seconds": 2.0, "kid_std": 0.5}).splitlines()
    assert [line.split() for line in lines] == [
        ["Unlearning", "accuracy", "98.8", "%"],
        ["Training", "time", "2.0", "s"],
        ["kid", "std", "0.5"],
    ]
    assert describe({}) == ""
