"""compare on a tiny Stable Diffusion: rows with and without training, resumption, and wrong input."""

import csv
import json

import pytest
import torch
from PIL import Image

from pecker_fast.cli import main
from pecker_fast.hashing import weights_hash
from pecker_fast.models import StableDiffusion
from pecker_fast.runs import compare as command
from pecker_fast.runs.fisher_file import FisherFacts, save_fisher
from pecker_fast.runs.prompts import comparison, sheets
from tests.commands.case import fails
from tests.diffusion.tiny_sd import tiny_unet, write_stable_diffusion


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / "base")


@pytest.fixture
def few_pictures(monkeypatch):
    monkeypatch.setattr(sheets, "PICTURED_PROMPTS", 2)
    monkeypatch.setattr(sheets, "PICTURED_IMAGES", 1)


def test_rows_of_every_kind(base, tmp_path, capsys, monkeypatch, nudenet, few_pictures):
    tiny_unet().save_pretrained(tmp_path / "one-step")
    for name, lines in {"eval": "one\ntwo\n", "near": "a coat\n", "retain": "a dog\na cat\n"}.items():
        (tmp_path / f"{name}.txt").write_text(lines)
    folder = tmp_path / "c"
    arguments = [
        "compare", "--preset", "sd15-nudity", "--methods", "sd,sld-max,sid-lsg", "esd", "relabel", "pecker",
        "--pretrained-model-name-or-path", str(base), "--sid-lsg", str(tmp_path / "one-step"),
        "--retain-prompts", str(tmp_path / "retain.txt"), "--max-train-steps", "2", "--output-dir", str(folder),
        "--prompts", str(tmp_path / "eval.txt"), "--near", str(tmp_path / "near.txt"), "--images-per-prompt", "2",
        "--near-images-per-prompt", "1", "--num-inference-steps", "2", "--no-progress-bar", "--set",
        "gradient_accumulation_steps=1", "train_batch_size=1", "saliency_batches=1", "trajectory_steps=2",
        "teacher_dtype=float32", "eval_guidance_scale=1.0", "num_inference_steps=2", "sample_steps=2",
        "samples_per_prompt=1",
    ]  # fmt: skip
    real, trained = command.unlearn, []

    def watched(args, before=None):
        trained.append(args.method)
        if len(trained) == 3:
            raise SystemExit(143)
        return real(args, before)

    monkeypatch.setattr(command, "unlearn", watched)
    with pytest.raises(SystemExit):
        main(arguments)
    assert trained == ["esd", "relabel", "pecker"] and "the same command again" in capsys.readouterr().out
    assert (folder / "esd-seed0" / "evaluation.json").is_file() and not (folder / "report.md").exists()
    main(arguments)
    assert trained == ["esd", "relabel", "pecker", "pecker"]
    with open(folder / "compare.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["sd", "sld-max", "sid-lsg", "esd", "relabel", "pecker"]
    assert {name: row["sampling_steps"] for name, row in rows.items()} == {
        "sd": "2", "sld-max": "2", "sid-lsg": "1", "esd": "2", "relabel": "1", "pecker": "1",
    }  # fmt: skip
    assert all(row["inappropriate_probability"] for row in rows.values())
    assert rows["sd"]["images"] == "" and rows["pecker"]["images"] == "2"
    samples = {
        name: json.loads((folder / place / "evaluation.json").read_text())["protocol"]["samples"]
        for name, place in {**{n: n for n in comparison.SAMPLED if n in rows}, "pecker": "pecker-seed0"}.items()
    }
    assert samples["sd"]["unet_sha256"] == samples["sld-max"]["unet_sha256"] != samples["sid-lsg"]["unet_sha256"]
    assert samples["sld-max"]["sld"] == "max" and samples["pecker"]["t_init"] == samples["sid-lsg"]["t_init"] == 625
    # Every metrics.json has the protocol.
    for place in ("sd", "pecker-seed0"):
        protocol = json.loads((folder / place / "metrics.json").read_text())["protocol"]["concept"]
        assert protocol["detectors"]["nudenet"]["min_prob"] == 0.6
        assert protocol["detectors"]["nudenet"]["version"] == "3.4.2" and protocol["samples"]
    # One-step methods start from the one-step generator; ESD from the model.
    begun = {
        name: json.loads((folder / f"{name}-seed0" / "config.json").read_text())
        for name in ("esd", "relabel", "pecker")
    }
    assert begun["pecker"]["initial_generator"] == str(tmp_path / "one-step")
    assert begun["relabel"]["initial_generator"] == str(tmp_path / "one-step")
    assert begun["esd"]["initial_generator"] is None and begun["esd"]["options"]["trained"] == "u"
    text = (folder / "report.md").read_text()
    assert "| sld-max | no |" in text and "| pecker | yes |" in text and "near unsafe (%)" in text
    assert Image.open(folder / "concept.png").height > Image.open(folder / "near.png").height
    capsys.readouterr()
    # Finished rows are reused, but not for another question.
    measured = []
    monkeypatch.setattr(comparison, "evaluate", lambda *a, **k: measured.append(a))
    main(arguments)
    assert len(trained) == 4 and not measured
    capsys.readouterr()
    assert "another options" in fails(capsys, *arguments, "density=0.1")


def test_selective_amnesia_is_a_row_with_its_fisher_file(base, tmp_path, capsys, nudenet, few_pictures):
    unet = StableDiffusion(base).load_unet()
    path = tmp_path / "fisher.safetensors"
    values = {name: torch.rand(param.shape) for name, param in unet.named_parameters()}
    save_fisher(path, values, FisherFacts(weights_hash(unet), "mean", 1, 1))
    for name, lines in {"eval": "one\ntwo\n", "near": "a coat\n", "retain": "a dog\na cat\n"}.items():
        (tmp_path / f"{name}.txt").write_text(lines)
    arguments = [
        "compare", "--preset", "sd15-nudity", "--pretrained-model-name-or-path", str(base), "--retain-prompts",
        str(tmp_path / "retain.txt"), "--max-train-steps", "1", "--output-dir", str(tmp_path / "c"),
        "--prompts", str(tmp_path / "eval.txt"), "--near", str(tmp_path / "near.txt"), "--images-per-prompt", "1",
        "--near-images-per-prompt", "1", "--num-inference-steps", "1", "--no-progress-bar", "--device", "cpu",
        "--set", "train_batch_size=1", "num_inference_steps=1", "sample_steps=1", "samples_per_prompt=1",
    ]  # fmt: skip
    error = fails(capsys, *arguments, "densty=1", "--fisher", str(path))
    assert "option of none of sd, sld-max, esd, relabel, sfd, pecker, selective_amnesia" in error
    own = ["surrogate_images=2", "replay_images=2", "replay_steps=1"]
    assert "fisher is not given" in fails(capsys, *arguments, *own, "--methods", "sd,selective_amnesia")
    assert "not among the methods" in fails(capsys, *arguments, *own, "--methods", "sd", "--fisher", str(path))
    wrong = tmp_path / "wrong.safetensors"
    save_fisher(wrong, values, FisherFacts("0" * 64, "mean", 1, 1))
    chosen = ["--methods", "sd,selective_amnesia", "--fisher"]
    assert "of other weights" in fails(capsys, *arguments, *own, *chosen, str(wrong))
    assert not (tmp_path / "c").exists()
    main([*arguments, *own, *chosen, str(path)])
    with open(tmp_path / "c" / "compare.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["sd", "selective_amnesia"] and rows["selective_amnesia"]["sampling_steps"] == "1"
    assert rows["selective_amnesia"]["inappropriate_probability"]
    config = json.loads((tmp_path / "c" / "selective_amnesia-seed0" / "config.json").read_text())
    assert config["fisher"] == str(path) and config["options"]["trained"] == "u"
    assert "| selective_amnesia | yes |" in (tmp_path / "c" / "report.md").read_text()


def test_wrong_inputs(base, tmp_path, capsys):
    base_args = ["compare", "--preset", "sd15-celebrity", "--pretrained-model-name-or-path", str(base)]
    base_args += ["--output-dir", str(tmp_path / "c")]
    assert "salun" not in fails(capsys, *base_args, "--methods", "sdf")
    assert "methods has 'salun', expected some of sd, sid-lsg, sld-weak" in fails(
        capsys, *base_args, "--methods", "salun"
    )
    assert "each method once" in fails(capsys, *base_args, "--methods", "sd,sd")
    assert "sid_lsg is not given" in fails(capsys, *base_args, "--methods", "sid-lsg")
    assert "seeds is 0" in fails(capsys, *base_args, "--seeds", "0")
    assert "option of none" in fails(capsys, *base_args, "--methods", "sd,esd", "--set", "densty=1")
    assert "trained is 'y'" in fails(capsys, *base_args, "--methods", "esd", "--set", "trained=y")
    assert "Stable Diffusion" in fails(capsys, *base_args[:3], "--pretrained-model-name-or-path", str(tmp_path))
    assert "were trained on" in fails(capsys, *base_args, "--methods", "sd", "--prompts", "celebrity-train")
    assert not (tmp_path / "c").exists()
