"""evaluate-concept measures what a run started from, too: the same prompts and seeds, once for all runs."""

import json

import pytest
import torch

from pecker_fast.cli import main
from pecker_fast.figures import figure
from pecker_fast.report.cautions import cautions
from pecker_fast.runs.prompts import sheets
from tests.commands.test_evaluate_concept import named  # noqa: F401  (a fixture)
from tests.diffusion.tiny_sd import tiny_unet, write_stable_diffusion

FEW = ["--no-progress-bar", "--num-inference-steps", "2", "--batch-size", "25", "--prompts", "prompts.txt"]
FEW += ["--near", "names.txt", "--images-per-prompt", "3", "--near-images-per-prompt", "1"]
KEYS = ("gcd_score", "no_face_share", "near_gcd_score", "near_no_face_share")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, a one-step generator, prompts, and runs of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sheets, "PICTURED_PROMPTS", 1)
    torch.manual_seed(0)
    write_stable_diffusion(tmp_path / "base")
    tiny_unet().save_pretrained(tmp_path / "generator")
    (tmp_path / "prompts.txt").write_text("a new picture of {concept}\n{concept} on the moon\n")
    (tmp_path / "names.txt").write_text("Green Man\n")
    (tmp_path / "retain.txt").write_text("a dog\na cat\n")
    return tmp_path


def unlearn(output: str, *more: str) -> None:
    words = ["unlearn", "--preset", "sd15-celebrity", "--pretrained_model_name_or_path", "base", "--sample_steps", "1"]
    words += ["--samples_per_prompt", "1", "--retain_prompts", "retain.txt", "--max_retain_prompts", "2"]
    main([*words, "--output_dir", f"runs/{output}", "--no-progress_bar", *more])


def measured(path: str, *more: str) -> dict:
    main(["evaluate-concept", path, *FEW, "--output", "out.json", *more])
    return json.loads(open("out.json").read())


def test_a_run_is_measured_beside_its_start(place, named, capsys):  # noqa: F811
    unlearn("relabelled", "--method", "relabel")
    run = measured("runs/relabelled", *named)
    base = measured("base", "--task", "celebrity", "--concept", "brad pitt", *named)
    # What the model that nobody has touched scores by itself, and nothing of what only counts images.
    assert {key: run[f"before_{key}"] for key in KEYS} == {key: base[key] for key in KEYS}
    assert not [key for key in run if key.startswith("before_") and "images" in key] and "before_gcd_score" not in base
    assert run["protocol"]["before"]["model"] == "base"
    assert run["protocol"]["before"]["samples"] == base["protocol"]["samples"]
    text = (place / "runs" / "relabelled" / "report.md").read_text()
    value = figure("gcd_score").text(base["gcd_score"])
    assert f"(before: {value}; lower is better)" in text and "| figure | before | value |" in text
    assert "those before the run" in text and "was not measured" not in text
    # Another run of the same model draws only its own images.
    (folder,) = (place / "runs").glob("before-*")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("chunk-*")}
    unlearn("other", "--method", "relabel", "--erase_scale", "0.5")
    again = measured("runs/other", *named)
    assert again["before_gcd_score"] == base["gcd_score"] and len(times) == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("chunk-*")} == times
    capsys.readouterr()


def test_a_given_generator_is_the_start_and_it_may_be_left_out(place, named, capsys):  # noqa: F811
    step = ["--max_train_steps", "1", "--train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    unlearn("sfd", "--method", "sfd", "--initial_generator", "generator", *step)
    without = measured("runs/sfd", *named, "--no-measure_before")
    assert not [key for key in without if key.startswith("before_")]
    assert "What the pretrained model has there was not measured" in (place / "runs/sfd/report.md").read_text()
    assert not list((place / "runs").glob("before-*"))
    run = measured("runs/sfd", *named)
    told = ["--task", "celebrity", "--concept", "brad pitt", "--base", "base", "--sampler", "one_step"]
    start = measured("generator", *told, "--t_init", "625", *named)
    assert {key: run[f"before_{key}"] for key in KEYS} == {key: start[key] for key in KEYS}
    # Nothing measures, so nothing is drawn of the start.
    assert "measured before" not in capsys.readouterr().err
    assert "before" not in measured("runs/sfd")["protocol"]
    # The start has gone.
    (place / "generator").rename(place / "elsewhere")
    gone = measured("runs/sfd", *named)
    assert "before_gcd_score" not in gone and "not measured before the run: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate-concept", "runs/sfd", *FEW, *named, "--measure_before"])
    assert "model is 'generator'" in capsys.readouterr().err
    alone = ["evaluate-concept", "base", *FEW, *named, "--task", "celebrity", "--concept", "brad pitt"]
    with pytest.raises(SystemExit):
        main([*alone, "--measure_before"])
    assert "measure_before is set, but what is measured is no run" in capsys.readouterr().err


def test_no_better_than_before():
    worse = {"gcd_score": 0.2, "before_gcd_score": 0.1, "clip_ua": 40.0, "before_clip_ua": 40.0}
    texts = cautions(worse)
    assert "The run did not improve it: GCD score 0.100 before the run, 0.200 now." in texts and len(texts) == 2
    assert cautions({"gcd_score": 0.1, "before_gcd_score": 0.2, "clip_ua": 41.0, "before_clip_ua": 40.0}) == []
