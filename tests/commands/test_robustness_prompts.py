"""robustness on runs of a tiny Stable Diffusion: rows, report, what an interrupted command keeps, wrong input."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from pecker_fast.cli import main
from pecker_fast.models import StableDiffusion
from pecker_fast.runs.prompts import robustness as command
from tests.commands.case import fails
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.metrics.clip_model import save_clip
from tests.report.test_render import check_page

UNLEARN = ["--max_train_steps", "1", "--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--sample_steps"]
UNLEARN += ["1", "--samples_per_prompt", "1", "--no-progress_bar", "--concept", "Brad Pitt", "--cover", "a man"]
SMALL = ["--relearn-images", "2", "--relearn-steps", "1", "2", "--inversion-steps", "1", "--images-per-prompt", "1"]
SMALL += ["--num-inference-steps", "2", "--no-progress-bar"]
ONE, DDIM = "one step at 625", "DDIM, 2 steps"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, lists of prompts, CLIP, and a run in one step."""
    folder = tmp_path_factory.mktemp("robust")
    write_stable_diffusion(folder / "model")
    (folder / "retain.txt").write_text("a dog\na cat\na tree\n")
    (folder / "forget.txt").write_text("a photo of {concept}\n{concept} smiles\n")
    (folder / "prompts.txt").write_text("{concept} on the moon\n{concept} in a hat\n")
    (folder / "near.json").write_text('{"others": ["a green man", "a cat"]}')
    save_clip(folder / "clip")
    lists = ["--retain_prompts", str(folder / "retain.txt"), "--forget_prompts", str(folder / "forget.txt")]
    words = ["unlearn", "--preset", "sd15-celebrity", "--pretrained_model_name_or_path", str(folder / "model"), *lists]
    start = ["--initial_generator", str(folder / "model")]
    main([*words, "--method", "sfd", "--output_dir", str(folder / "run"), *start, *UNLEARN])
    return folder


def words_for(place, *more: str) -> list[str]:
    lists = ["--prompts", str(place / "prompts.txt"), "--near", str(place / "near.json")]
    return ["robustness", str(place / "run"), "--clip", str(place / "clip"), *lists, *SMALL, *more]


def read(place) -> dict:
    return json.loads((place / "run" / "robustness.json").read_text())


def test_a_run_and_what_it_started_from(place, capsys, monkeypatch):
    run = place / "run"
    before = json.loads((run / "metrics.json").read_text())
    attacked = []
    real = command.attack_text
    monkeypatch.setattr(command, "attack_text", lambda *a: attacked.append(a[3]) or real(*a))
    main(words_for(place))
    output, result = capsys.readouterr().out, read(place)
    assert str(run / "robustness.md") in output and "The control is missing" in output
    tried = {(row["network"], row["attack"], row["sampler"], row["step"]) for row in result["relearn"]}
    steps = {"regression": (0, 1, 2), "matching": (0, 1, 2), "denoising": (0, 1, 2), "inversion": (0, 1)}
    expected = {
        (network, name, sampler, step)
        for network in ("run", "relabel")
        for name, every in steps.items()
        for sampler in ((ONE, DDIM) if name == "denoising" else (ONE,))
        for step in every
    }
    assert tried == expected and len(result["relearn"]) == len(expected)
    assert all(0 <= row["ua"] <= 100 and row["near_clip_score"] >= 0 for row in result["relearn"])
    assert attacked == [*steps] * 2
    # It leads with the costs, beside the relabelled network: of fine-tuning, and of inversion.
    text = (run / "robustness.md").read_text()
    for key, words in (("cost", "Fine-tuning: "), ("inversion_cost", "Concept inversion: ")):
        assert list(result[key]["networks"]) == ["run", "relabel"] and list(result[key]["verdicts"]) == ["relabel"]
        verdict = result[key]["verdicts"]["relabel"]["text"]
        assert "concept" in verdict and words + verdict in output and verdict in text
        assert verdict in (run / "report.md").read_text()
    assert text.index("What it costs to bring the concept back") < text.index("## Request") < text.index("## Pictures")
    page = check_page((run / "robustness.html").read_text())
    assert page.tags.count("figure") == 9 and Image.open(run / "robustness.png").size[0] > 300
    metrics = json.loads((run / "metrics.json").read_text())
    assert {key: metrics[key] for key in before} == before
    assert {key: metrics[key] for key in result["summary"]} == result["summary"]
    rows = [row["ua"] for row in result["relearn"] if (row["network"], row["step"]) == ("run", 2)]
    assert result["summary"]["relearn_forget_ua_2"] == min(rows) and "inversion_ua_1" in result["summary"]
    protocol = result["protocol"]
    assert protocol["weights_sha256"]["run"] != protocol["weights_sha256"]["relabel"]
    assert protocol["relearn"]["images_are"] == "drawn by the pretrained model" and protocol["initial_word"] == "a man"
    assert (
        protocol["decided_by"] == "clip"
        and 0 <= protocol["relearn"]["images_shown_ua"] <= 100
        and list(protocol["relearn"]["pretrained"]) == [DDIM]
    )
    assert "attacks the run" not in (run / "report.md").read_text() and str(place) not in json.dumps(result)

    # Complete attacks are kept: after an interruption only what was lost is done again, and gives the same rows.
    next(iter((run / "samples").glob("relearn-relabel-inversion.png"))).unlink()
    attacked.clear()
    main(words_for(place))
    assert attacked == ["inversion"] and read(place)["relearn"] == result["relearn"]


def test_images_of_ones_own_and_a_control(place, capsys):
    images = place / "images"
    images.mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 30, 3), 60 * i, np.uint8)).save(images / f"{i}.png")
    own = ["--attacks", "inversion", "--concept-images", str(images), "--initial-word", "dog"]
    main(words_for(place, *own, "--control", str(place / "run")))
    result = read(place)
    assert result["protocol"]["relearn"]["images_are"] == "given" and result["protocol"]["initial_word"] == "dog"
    # The control has the run's weights, hence its rows; the attack on it was made once.
    rows = [
        [{**row, "network": ""} for row in result["relearn"] if row["network"] == name] for name in ("run", "control")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert result["protocol"]["notes"] == [] and "The control is missing" not in capsys.readouterr().out


def test_a_model_that_draws_in_many_steps_and_a_detector_of_unsafe_images(place, nudenet, capsys):
    words = ["unlearn", "--preset", "sd15-nudity", "--method", "esd", "--pretrained_model_name_or_path"]
    folder = place / "esd"
    (place / "bare.txt").write_text("a bare man\na bare dog\n")
    (place / "dressed.txt").write_text("a man\na dog\n")
    options = ["--max_train_steps", "1", "--sample_steps", "1", "--samples_per_prompt", "1", "--no-progress_bar"]
    options += ["--forget_prompts", str(place / "bare.txt"), "--cover_prompts", str(place / "dressed.txt")]
    options += ["--retain_prompts", str(place / "retain.txt")]
    main([*words, str(place / "model"), "--output_dir", str(folder), *options])
    scenes = place / "scenes.txt"
    scenes.write_text("a man in a coat\n")
    main(["robustness", str(folder), "--prompts", str(scenes), "--near", str(scenes), *SMALL, "--attacks", "inversion"])
    result = json.loads((folder / "robustness.json").read_text())
    assert {(row["network"], row["sampler"]) for row in result["relearn"]} == {("run", DDIM), ("relabel", DDIM)}
    assert result["concept"] is None and "near_inappropriate_probability" in result["relearn"][0]
    assert "concept of the prompts" in (folder / "robustness.md").read_text()
    capsys.readouterr()


def test_wrong_input_writes_nothing(place, tmp_path, capsys, monkeypatch):
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("robustness*", "evaluation"))
    words = words_for(place)
    words[1] = str(tmp_path / "run")

    def refused(*more: str, without: str = "") -> str:
        kept = list(words)
        if without:
            del kept[kept.index(without) : kept.index(without) + 2]
        error = fails(capsys, *kept, *more)
        assert not (tmp_path / "run" / "robustness.json").exists() and not (tmp_path / "run" / "evaluation").exists()
        return error

    assert "clip is not given" in refused(without="--clip")
    assert "attacks is latent" in refused("--attacks", "latent")
    assert "concept is 'Tom'" in refused("--concept", "Tom")
    assert "relearn_steps is [2, 1]" in refused("--relearn-steps", "2", "1")
    assert "inversion_steps" in refused("--inversion-steps", "0")
    (tmp_path / "empty").mkdir()
    assert "concept_images is" in refused("--concept-images", str(tmp_path / "empty"))
    assert "control is" in refused("--control", str(place / "model"))
    assert "relabel is" in refused("--relabel", "/no/such")
    assert "guidance_scale" in refused("--guidance-scale", "-1")
    assert "expected one: text" in refused(words[1])
    assert "--latents" in refused("--latents", "3")
    with monkeypatch.context() as patch:
        # As transformers have it.
        patch.setattr(StableDiffusion, "learns_words", False)
        assert "attacks has 'inversion', but Stable Diffusion has text encoders" in refused("--attacks", "inversion")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "pretrained_model_name_or_path": "/none"}))
    assert "/none" in refused()
