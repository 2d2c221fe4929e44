"""evaluate: samples drawn once, gone on with, and measured; wrong input."""

import json

import pytest
import safetensors.torch
import torch

from pecker_fast.cli import main
from pecker_fast.commands import evaluate as command
from pecker_fast.commands import sample as drawing
from pecker_fast.diffusion import NoiseSchedule, save_network
from pecker_fast.metrics import Uint8Images
from tests.diffusion.toy import tiny_unet
from tests.test_cli_training import QUIET, SMALL, fails


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    main(["unlearn", "--output_dir", str(folder), "--forget_classes", "0", "3", *SMALL, *QUIET])
    return folder


def evaluated(folder, *arguments: str) -> dict:
    main(["evaluate", "--pretrained-model-name-or-path", str(folder), "--no-progress-bar", *arguments])
    return json.loads((folder / "evaluation.json").read_text())


def test_a_run_is_measured_as_it_was_asked(run, capsys, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 7)
    before = json.loads((run / "metrics.json").read_text())
    found = evaluated(run, "--samples-per-class", "3")
    assert "ua" in capsys.readouterr().out
    protocol = found["protocol"]
    assert protocol["forget_classes"] == [0, 3] and protocol["cover_class"] == 1
    assert protocol["samples"]["sampler"] == "one_step" and protocol["samples"]["t_init"] == 250
    assert protocol["judge"]["name"] == "digits-judge" and protocol["environment"]
    assert 0 <= found["ua"] <= 100 and found["frechet_distance"] > 0
    # Inception has not been asked for: none of its names.
    assert not {"fid", "is", "kid", "precision", "recall"} & set(found)
    assert json.loads((run / "metrics.json").read_text())["ua"] == before["ua"]
    # Drawn once: a second time no network is called, and a chunk that is lost or damaged is all that is drawn again.
    real, calls = drawing.sample_one_step, []

    def counted(network, generator, labels, **options):
        calls.append(len(labels))
        return real(network, generator, labels, **options)

    monkeypatch.setattr(drawing, "sample_one_step", counted)
    assert evaluated(run, "--samples-per-class", "3") == found and calls == []
    (folder,) = (run / "evaluation").iterdir()
    chunks = sorted(folder.glob("chunk-*"))
    assert len(chunks) == 5
    chunks[1].unlink()
    chunks[3].write_bytes(chunks[3].read_bytes()[:50])
    assert evaluated(run, "--samples-per-class", "3") == found and calls == [7, 7]
    # Of another seed, or another number of images, there are none yet.
    other = evaluated(run, "--samples-per-class", "3", "--seed", "1")
    assert other["frechet_distance"] != found["frechet_distance"] and len(calls) == 7


def test_samples_are_of_the_labels_asked_for(tmp_path):
    asked = []

    def draw(labels, seed):
        asked.append(seed)
        return labels.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 10

    labels = torch.arange(5).repeat_interleave(3)
    cache = command.SampleCache(tmp_path, {"weights": "a"}, draw)
    images = cache.samples(labels, 0, progress=False)
    assert torch.equal(images[:, 0, 0, 0], labels / 10)
    path = next(cache.folder.glob("chunk-*"))
    kept = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**kept, "labels": kept["labels"] + 1}, path)
    assert torch.equal(cache.samples(labels, 0, progress=False), images) and len(asked) == 2
    assert command.SampleCache(tmp_path, {"weights": "b"}, draw).folder != cache.folder


def test_inception_measures_retained_classes(run, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"")
    seen = {}

    def measured(generated, real, **options):
        assert isinstance(generated, Uint8Images) and options["weights"] == str(weights)
        seen.update(generated=len(generated), real=len(real), first=generated[0], last=real[len(real) - 1])
        return {"fid": 1.5, "is": 2.0, "protocol": {"k": 3}}

    monkeypatch.setattr(command, "image_quality", measured)
    found = evaluated(run, "--samples-per-class", "4", "--inception-weights", str(weights))
    assert (found["fid"], found["is"], found["protocol"]["image_quality"]) == (1.5, 2.0, {"k": 3})
    # Eight of ten classes are retained.
    assert seen["generated"] == 32 and seen["real"] == found["protocol"]["real_images"]
    assert seen["first"].shape == seen["last"].shape == (3, 8, 8) and seen["last"].dtype is torch.uint8
    assert json.loads((run / "metrics.json").read_text())["fid"] == 1.5
    capsys.readouterr()


def test_a_network_that_has_not_unlearned(capsys, tmp_path):
    target = tmp_path / "before.json"
    main(["evaluate", "--samples-per-class", "2", "--num-inference-steps", "3", "--output", str(target),
          "--no-progress-bar"])  # fmt: skip
    found = json.loads(target.read_text())
    assert found["ua"] is None and found["protocol"]["samples"]["sampler"] == "ddim"
    capsys.readouterr()


def test_wrong_inputs(run, capsys, tmp_path):
    given = ["evaluate", "--pretrained-model-name-or-path", str(run), "--no-progress-bar"]
    assert "samples_per_class is 1" in fails(capsys, *given, "--samples-per-class", "1")
    assert "inception-2015-12-05" in fails(capsys, *given, "--inception-weights", str(tmp_path / "nowhere"))
    assert "forget_classes is 10" in fails(capsys, *given, "--forget-classes", "10")
    assert "cover_class" in fails(capsys, *given, "--cover-class", "3")
    assert "judge" in fails(capsys, *given, "--judge", str(tmp_path / "nowhere"))
    assert "no folder" in fails(capsys, *given, "--output", str(tmp_path / "no" / "a.json"))
    save_network(tmp_path / "tiny", tiny_unet(), NoiseSchedule.linear())
    tiny = ["evaluate", "--pretrained-model-name-or-path", str(tmp_path / "tiny")]
    assert "t_init" in fails(capsys, "evaluate", "--sampler", "one_step")
    assert "judge is not given" in fails(capsys, *tiny, "--preset-name", "cifar10")
    assert "has 3 classes" in fails(capsys, *tiny, "--sampler", "ddim")
