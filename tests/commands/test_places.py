"""Runs and files by their place, the older options beside it, and options that would not be used."""

import json

import pytest
from PIL import Image, ImageChops

from pecker_fast.cli import main
from pecker_fast.mask import SaliencyMask
from pecker_fast.metrics import load_judge
from tests.commands.case import ASSETS, QUIET, SMALL, fails, image_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run with a mask, and one without."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("pecker", "sfd"):
        main(["unlearn", "--method", method, "--output_dir", str(folder / method), *SMALL, *QUIET, "--no-evaluate"])
    return folder


def test_sample(capsys, runs, tmp_path):
    run = str(runs / "pecker")
    written = {
        "place": [run, "--labels", "0,1"],
        "option": ["--pretrained-model-name-or-path", run, "--labels", "0", "1"],
        "last": ["--labels=0,1", "--pretrained_model_name_or_path", run],
    }
    capsys.readouterr()
    for name, words in written.items():
        main(["sample", *words, "--images_per_class", "2", "--output", str(tmp_path / f"{name}.png")])
        assert f"4 images of {run}, sampler one_step" in capsys.readouterr().out
    pictures = [Image.open(tmp_path / f"{name}.png") for name in written]
    assert all(ImageChops.difference(pictures[0], other).getbbox() is None for other in pictures[1:])
    output = ["--output", str(tmp_path / "a.png")]
    ddim = ["--sampler", "ddim", "--t_init", "200"]
    assert "t_init is 200, but sampler is ddim" in fails(capsys, "sample", *output, *ddim)
    assert "num_inference_steps is 3, but the network is sampled in one step" in fails(
        capsys, "sample", run, *output, "--num_inference_steps", "3"
    )


def test_mask(capsys, runs, tmp_path):
    file = runs / "pecker" / "mask.safetensors"
    capsys.readouterr()
    shown = []
    for words in ([str(runs / "pecker")], [str(file)], ["--inspect", str(file)], ["--run", str(runs / "pecker")]):
        main(["mask", *words])
        shown.append(capsys.readouterr().out)
    assert SaliencyMask.load(file).summary() in shown[0] and len({*shown}) == 1
    network, small = str(ASSETS / "digits" / "unet"), ["--saliency_batch_size", "4"]
    for words in ([network, *small], ["--pretrained_model_name_or_path", network, *small], small):
        main(["mask", *words])
        shown.append(capsys.readouterr().out)
    assert len({*shown}) == 2
    assert "sfd has no mask" in fails(capsys, "mask", str(runs / "sfd"))
    error = fails(capsys, "mask", str(runs / "pecker"), "--density", "0.3")
    assert "density is 0.3, but the mask in" in error and "is read, not computed" in error
    assert "inspect is 'a', but" in fails(capsys, "mask", network, "--inspect", "a")


def test_train_classifier(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"epochs": "3", "batch_size": "64", "learning_rate": "0.1", "resize": "32", "seed": "1"}.items():
        error = fails(capsys, "train-classifier", "--preset", "digits", f"--{name}", value)
        assert error.startswith(f"pecker-fast train-classifier: {name} is {value}, but"), error
        assert "but the classifier of digits has one recipe: expected it to be left out" in error
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-judge.safetensors").write_bytes(b"mine")
    error = fails(capsys, "train-classifier", "--preset", "digits")
    assert "output is not given, and runs/digits-judge.safetensors exists already" in error
    assert (tmp_path / "runs" / "digits-judge.safetensors").read_bytes() == b"mine"


def test_judge_and_images_of_other_classes_are_named(capsys, tmp_path):
    judge, images = tmp_path / "judge.safetensors", image_folder(tmp_path / "images", 3, 4)
    load_judge("digits").save(judge)
    own = ["--dataset_name", f"folder:{images}", "--num_classes", "3", "--in_channels", "3", "--sample_size", "8"]
    small = ["--max_train_steps", "2", "--train_batch_size", "2", "--samples_per_class", "2", *QUIET]
    out = ["--output_dir", str(tmp_path / "p")]
    error = fails(capsys, "pretrain", *own, *small, *out, "--judge", str(judge))
    assert f"judge {judge} has 10 classes (0, 1, 2, 3, 4, 5 and 4 more), the network has 3" in error
    assert not (tmp_path / "p").exists()
    # The judge of the preset knows other images, and is not asked.
    main(["pretrain", *own, *small, *out])
    assert "accuracy" not in json.loads((tmp_path / "p" / "metrics.json").read_text())
    network = ["--pretrained_model_name_or_path", str(tmp_path / "p"), "--output_dir", str(tmp_path / "u")]
    capsys.readouterr()
    error = fails(capsys, "unlearn", *network, *SMALL, *QUIET, "--judge", str(judge))
    assert f"judge {judge} has 10 classes" in error and "the network has 3" in error
    assert not (tmp_path / "u" / "config.json").exists()
    # Classes of the same number but other names.
    digits = image_folder(tmp_path / "ten", 10, 1)
    error = fails(capsys, "unlearn", "--dataset_name", f"folder:{digits}", *SMALL, *network[2:])
    assert "the preset's judge has the classes 0, 1, 2, 3, 4, 5 and 4 more, but dataset_name folder:" in error
    assert "has class0, class1, class2, class3, class4, class5 and 4 more" in error
    # The digits' own judge by its file measures like the preset's.
    main(["pretrain", "--judge", str(judge), *small, "--output_dir", str(tmp_path / "d")])
    main(["pretrain", *small, "--output_dir", str(tmp_path / "e")])
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("d", "e"))
    assert first["accuracy"] == second["accuracy"] and first["frechet_distance"] == second["frechet_distance"]
