"""Runs and files by their place, the older options beside it, and options that would not be used."""

import pytest
from PIL import Image, ImageChops

from pecker_fast.cli import main
from pecker_fast.mask import SaliencyMask
from tests.commands.case import ASSETS, QUIET, SMALL, fails


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
    # Set to its default, it is not used either.
    assert "seed is 0, but the mask in" in fails(capsys, "mask", str(file), "--seed", "0")


def test_train_classifier(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"epochs": "3", "batch_size": "64", "learning_rate": "0.1", "resize": "32", "seed": "1"}.items():
        error = fails(capsys, "train-classifier", "--preset", "digits", f"--{name}", value)
        assert error.startswith(f"pecker-fast train-classifier: {name} is {value}, but"), error
        assert "but the classifier of digits has one recipe: expected it to be left out" in error
    # It is a small network.
    assert "seed is 1, but" in fails(
        capsys, "train-classifier", "--preset", "digits", "--network", "small", "--seed", "1"
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-judge.safetensors").write_bytes(b"mine")
    error = fails(capsys, "train-classifier", "--preset", "digits")
    assert "output is not given, and runs/digits-judge.safetensors exists already" in error
    assert (tmp_path / "runs" / "digits-judge.safetensors").read_bytes() == b"mine"
