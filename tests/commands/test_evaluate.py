"""evaluate: samples are drawn once, resumed, and measured; wrong input."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pecker_fast.cli import main
from pecker_fast.data import load_digits_images
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.diffusion import sampler as drawing
from pecker_fast.metrics import Uint8Images
from pecker_fast.models import save_network
from pecker_fast.runs.classes import evaluation as command
from tests.commands.case import QUIET, SMALL, fails
from tests.diffusion.toy import tiny_unet
from tests.metrics.inception import random_inception
from tests.report.test_render import check_page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    main(["unlearn", "--output_dir", str(folder), "--forget_classes", "0", "3", *SMALL, *QUIET])
    return folder


def evaluated(folder, *arguments: str) -> dict:
    main(["evaluate", str(folder), "--no-progress-bar", *arguments])
    return json.loads((folder / "evaluation.json").read_text())


def test_run_is_evaluated_with_its_own_request(run, capsys, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 7)
    before = json.loads((run / "metrics.json").read_text())
    result = evaluated(run, "--samples-per-class", "3")
    assert "Unlearning accuracy" in capsys.readouterr().out
    protocol = result["protocol"]
    assert protocol["forget_classes"] == [0, 3] and protocol["cover_class"] == 1
    assert protocol["samples"]["sampler"] == "one_step" and protocol["samples"]["t_init"] == 250
    assert protocol["judge"]["name"] == "digits-judge" and protocol["environment"]
    assert 0 <= result["ua"] <= 100 and result["frechet_distance"] > 0
    # Inception is not requested, so none of its names appears.
    assert not {"fid", "sfid", "is", "kid", "precision", "recall"} & set(result)
    assert 0 <= result["extractor_precision"] <= 1 and 0 <= result["extractor_recall"] <= 1
    assert protocol["image_quality"]["feature_extractor"] == result["feature_extractor"] == "digits-judge-64"
    assert protocol["reference"] == {"dataset": "digits", "split": "all", "classes": "retained"}
    assert protocol["environment"]["packages"]["torch-fidelity"]
    # The weights that were measured are those that the run saved.
    assert protocol["samples"]["pretrained_sha256"] == before["weights_sha256"]
    after = json.loads((run / "metrics.json").read_text())
    assert after["ua"] == before["ua"] and after["protocol"]["samples"]["samples_per_class"] == 3
    assert {k: v for k, v in before.items() if k != "protocol"}.items() <= after.items()
    # Drawn once: the second time no network is called, and only a lost or damaged chunk is drawn again.
    real, calls = drawing.sample_one_step, []

    def counted(network, generator, labels, **options):
        calls.append(len(labels))
        return real(network, generator, labels, **options)

    monkeypatch.setattr(drawing, "sample_one_step", counted)
    assert evaluated(run, "--samples-per-class", "3") == result and calls == []
    (folder,) = (run / "evaluation").iterdir()
    chunks = sorted(folder.glob("chunk-*"))
    assert len(chunks) == 5
    chunks[1].unlink()
    chunks[3].write_bytes(chunks[3].read_bytes()[:50])
    assert evaluated(run, "--samples-per-class", "3") == result and calls == [7, 7]
    # For another seed, or another number of images, there are none yet.
    other = evaluated(run, "--samples-per-class", "3", "--seed", "1")
    assert other["frechet_distance"] != result["frechet_distance"] and len(calls) == 7


def test_metrics_have_the_last_evaluation(run, capsys):
    """The run's own figures stay, those of an earlier evaluation are replaced, and the report is refreshed."""
    run_ua = json.loads((run / "metrics.json").read_text())["ua"]
    values = []
    for seed in ("3", "4"):
        result = evaluated(run, "--samples-per-class", "3", "--seed", seed)
        metrics = json.loads((run / "metrics.json").read_text())
        record = metrics["protocol"]["evaluation"]
        assert record["samples"]["seed"] == int(seed) and "extractor_precision" in record["measured"]
        assert "ua" not in record["measured"] and metrics["ua"] == run_ua
        assert metrics["extractor_frechet_distance"] == result["extractor_frechet_distance"]
        values.append(result["extractor_frechet_distance"])
        page = check_page((run / "report.html").read_text())
        assert f"{values[-1]:.2f}" in page.text and "Precision, judge's features" in page.text
        # Our own write does not count as a change by others.
        hashes = json.loads((run / "hashes.json").read_text())
        assert hashes["metrics.json"]["sha256"] == hashlib.sha256((run / "metrics.json").read_bytes()).hexdigest()
        assert "CHANGED" not in page.text
    assert values[0] != values[1]
    capsys.readouterr()


def test_many_step_run_is_sampled_by_its_own_sampler(capsys, tmp_path):
    folder = tmp_path / "salun"
    options = ["--eval_sampler", "ddim", "--num_inference_steps", "4", "--eval_guidance_scale", "1"]
    main(["unlearn", "--method", "salun", "--output_dir", str(folder), "--max_train_steps", "2", "--train_batch_size",
          "3", "--samples_per_class", "2", "--clip_sample", *options, *QUIET])  # fmt: skip
    config, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))
    assert config["training_images"] > 1000 and metrics["protocol"]["samples"]["sampling_steps"] == 4
    # Its mask, once for the run, and a report in which frozen entries are not changed.
    drift = json.loads((folder / "drift.json").read_text())["total"]
    assert 0 < drift["changed"] <= drift["salient"] == pytest.approx(0.5, abs=0.01)
    assert "DDIM, 4 steps" in (folder / "report.md").read_text() and (folder / "README.md").exists()
    samples = evaluated(folder, "--samples-per-class", "2")["protocol"]["samples"]
    assert (samples["sampler"], samples["num_inference_steps"], samples["guidance_scale"]) == ("ddim", 4, 1.0)
    assert samples["clip_sample"] is True
    other = ("--sampler", "ddpm", "--num-inference-steps", "3")
    samples = evaluated(folder, "--samples-per-class", "2", *other)["protocol"]["samples"]
    assert (samples["sampler"], samples["num_inference_steps"]) == ("ddpm", 3)
    capsys.readouterr()


def test_without_torch_fidelity(run, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    main(["evaluate", str(run), "--no-progress-bar", "--samples-per-class", "3", "--output", str(run / "other.json")])
    assert "extractor_precision" not in json.loads((run / "other.json").read_text())
    assert "torch-fidelity is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_inception_end_to_end(capsys, tmp_path, monkeypatch):
    """FID and the other figures equal a direct call of torch-fidelity, and sFID equals numpy's."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = random_inception(tmp_path)
    digits = load_digits_images("test")
    chosen = torch.cat([(digits.labels == label).nonzero().flatten()[:2] for label in range(10)])
    monkeypatch.setattr(command, "load_images", lambda *_args: digits.subset(chosen))
    eigvals = np.linalg.eigvals

    def of_low_rank(matrix):
        """Eigenvalues of a product of two covariances, each of four images: all but a few are zero."""
        # Random combinations of its columns span its column space, in which it is a matrix of eight rows.
        basis, _ = np.linalg.qr(matrix @ np.random.default_rng(0).standard_normal((len(matrix), 8)))
        assert np.linalg.norm(matrix - basis @ (basis.T @ matrix)) <= 1e-12 * np.linalg.norm(matrix)
        return np.concatenate([eigvals(basis.T @ matrix @ basis), np.zeros(len(matrix) - 8)])

    monkeypatch.setattr(np.linalg, "eigvals", of_low_rank)
    target = tmp_path / "e.json"
    main(["evaluate", "--forget-classes", *"01234567", "--cover-class", "8", "--samples-per-class", "2",
          "--num-inference-steps", "2", "--inception-weights", str(weights), "--output", str(target),
          "--no-progress-bar"])  # fmt: skip
    result = json.loads(target.read_text())
    capsys.readouterr()
    (chunk,) = (tmp_path / "evaluation").rglob("chunk-*")
    drawn = safetensors.torch.load_file(chunk)
    retained = digits.subset(chosen).of_classes([8, 9])

    class Pixels(torch.utils.data.Dataset):
        def __init__(self, x):
            grey = np.rint((np.clip(x.numpy().astype(np.float64), -1, 1) + 1) * 127.5).astype(np.uint8)
            self.x = torch.from_numpy(np.repeat(grey, 3, axis=1))

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[i]

    generated, real = Pixels(drawn["images"][drawn["labels"] > 7]), Pixels(retained.tensor())
    assert len(generated) == len(real) == 4
    by_hand = torch_fidelity.calculate_metrics(
        input1=generated, input2=real, isc=True, fid=True, kid=True, prc=True, isc_splits=1, kid_subset_size=4,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights), samples_shuffle=True,
        cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    for ours, theirs in (
        ("fid", "frechet_inception_distance"), ("is", "inception_score_mean"), ("precision", "precision"),
        ("kid", "kernel_inception_distance_mean"), ("recall", "recall"),
    ):  # fmt: skip
        assert result[ours] == pytest.approx(by_hand[theirs], rel=1e-6), ours
    assert result["fid"] > 0 and result["is"] > 1
    quality = result["protocol"]["image_quality"]
    assert quality["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (quality["generated_images"], quality["real_images"], quality["isc_splits"]) == (4, 4, 1)
    # There are not enough further real images to compare with four.
    assert result["protocol"]["real_split"]["images"] == 2 and result["frechet_real_split"] >= 0
    assert "mixed_6/conv" in quality["sfid_feature_extractor"]

    network = FeatureExtractorInceptionV3("by hand", ["768"], feature_extractor_weights_path=str(weights))
    outputs = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _inputs, out: outputs.append(out))
    for images in (generated, real):
        network(images.x)
    a, b = (x[:, :7].permute(0, 2, 3, 1).reshape(4, -1).double().numpy() for x in outputs)
    # tr (A B)^1/2 is the sum of the singular values of the two sets' inner products, centred: four by four.
    shared = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False).sum() / 3
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * shared
    assert a.shape == (4, 2023) and result["sfid"] == pytest.approx(expected, rel=1e-3)


def test_samples_have_the_requested_labels(tmp_path):
    seeds = []

    def draw(labels, seed):
        seeds.append(seed)
        return labels.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / 10

    labels = torch.arange(5).repeat_interleave(3)
    cache = command.SampleCache(tmp_path, {"weights": "a"}, draw)
    images = cache.samples(labels, 0, progress=False)
    assert torch.equal(images[:, 0, 0, 0], labels / 10)
    path = next(cache.folder.glob("chunk-*"))
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "labels": tensors["labels"] + 1}, path)
    assert torch.equal(cache.samples(labels, 0, progress=False), images) and len(seeds) == 2
    assert command.SampleCache(tmp_path, {"weights": "b"}, draw).folder != cache.folder


def test_inception_measures_retained_classes(run, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"")
    inputs = {}

    def measured(generated, real, **options):
        assert isinstance(generated, Uint8Images) and options["weights"] == str(weights)
        inputs.update(generated=len(generated), real=len(real), first=generated[0], last=real[len(real) - 1])
        return {"fid": 1.5, "is": 2.0, "protocol": {"k": 3}}

    monkeypatch.setattr(command, "image_quality", measured)
    monkeypatch.setattr(command, "check_inception_weights", Path)
    result = evaluated(run, "--samples-per-class", "4", "--inception-weights", str(weights))
    assert (result["fid"], result["is"], result["protocol"]["image_quality"]) == (1.5, 2.0, {"k": 3})
    # Eight of ten classes are retained.
    assert inputs["generated"] == 32 and inputs["real"] == result["protocol"]["real_images"]
    assert inputs["first"].shape == inputs["last"].shape == (3, 8, 8) and inputs["last"].dtype is torch.uint8
    assert json.loads((run / "metrics.json").read_text())["fid"] == 1.5
    capsys.readouterr()


def test_a_network_that_has_not_unlearned(capsys, tmp_path):
    target = tmp_path / "before.json"
    main(["evaluate", "--samples-per-class", "2", "--num-inference-steps", "3", "--output", str(target),
          "--no-progress-bar"])  # fmt: skip
    result = json.loads(target.read_text())
    assert result["ua"] is None and result["protocol"]["samples"]["sampler"] == "ddim"
    capsys.readouterr()


def test_wrong_inputs(run, capsys, tmp_path):
    base_args = ["evaluate", "--pretrained-model-name-or-path", str(run), "--no-progress-bar"]
    assert "expected one of the two" in fails(capsys, *base_args, "somewhere")
    assert "samples_per_class is 1" in fails(capsys, *base_args, "--samples-per-class", "1")
    assert "no inception_weights" in fails(capsys, *base_args, "--features-dir", "features")
    assert "inception-2015-12-05" in fails(capsys, *base_args, "--inception-weights", str(tmp_path / "nowhere"))
    assert "forget_classes is 10" in fails(capsys, *base_args, "--forget-classes", "10")
    assert "cover_class" in fails(capsys, *base_args, "--cover-class", "3")
    assert "judge" in fails(capsys, *base_args, "--judge", str(tmp_path / "nowhere"))
    assert "no folder" in fails(capsys, *base_args, "--output", str(tmp_path / "no" / "a.json"))
    save_network(tmp_path / "tiny", tiny_unet(), NoiseSchedule.linear())
    tiny = ["evaluate", "--pretrained-model-name-or-path", str(tmp_path / "tiny")]
    assert "t_init" in fails(capsys, "evaluate", "--sampler", "one_step")
    assert "judge is not given" in fails(capsys, *tiny, "--preset", "cifar10")
    assert "judge is not given" in fails(capsys, *tiny, "--preset-name", "cifar10")
    assert "digits has the 10 classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, the network 3 classes" in fails(
        capsys, *tiny, "--sampler", "ddim"
    )
