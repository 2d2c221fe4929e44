"""Runs from Python: the same files as the command, objects in memory, wrong arguments."""

import json

import pytest
import torch

import pecker_fast as pf
from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.diffusion.pipeline import OneStepPipeline
from pecker_fast.hashing import weights_hash
from pecker_fast.models import load_network, resolve, save_network
from pecker_fast.runs.folder import RUN_FILES
from tests.commands.case import ASSETS
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits

SMALL = {"max_train_steps": 2, "train_batch_size": 3, "forget_batch_size": 2, "samples_per_class": 2}
SMALL |= {"progress_bar": False, "device": "cpu"}
# Values that depend on the machine's load.
TIMED = {"seconds", "seconds_per_image", "peak_memory_bytes"}


def words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value)) if name != "progress_bar"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    return pf.unlearn("digits", method="pecker", forget=[0, 3], cover=1, output_dir=str(folder), **SMALL)


def test_api_run_equals_command_run(run, tmp_path):
    command = ["unlearn", "--method", "pecker", "--forget_classes", "0", "3", "--cover_class", "1", "--no-progress_bar"]
    main([*command, "--output_dir", str(tmp_path / "run"), *words(SMALL)])
    other = pf.Run(tmp_path / "run")
    assert {path.name for path in run.folder.iterdir()} == {path.name for path in other.folder.iterdir()}
    assert {**run.config, "output_dir": ""} == {**other.config, "output_dir": ""}
    assert {k: v for k, v in run.metrics.items() if k not in TIMED} == {
        k: v for k, v in other.metrics.items() if k not in TIMED
    }
    for name in ("unet/diffusion_pytorch_model.safetensors", "drift.json", "samples/before_after.png"):
        assert (run.folder / name).read_bytes() == (other.folder / name).read_bytes(), name
    assert same_bits(run.mask.words, other.mask.words)


def test_run_attributes(run):
    assert run.has_ended and "pecker on digits, ended" in repr(run)
    assert run.metrics["ua"] >= 0 and run.metrics["iterations"] == 2
    assert run.mask.names == tuple(name for name, _ in run.model.network.named_parameters())
    assert run.report.read_text().startswith("#") and run.log[-1]["step"] == 2 == run.evaluations[-1]["step"]
    assert isinstance(run.pipeline, OneStepPipeline)
    assert same_bits(run.pipeline.unet.conv_in.weight, run.model.network.conv_in.weight)
    assert len(run.pipeline([0, 1]).images) == 2 and run.model.sampler().kind == "one_step"
    figures = pf.evaluate(run, samples_per_class=3, seed=5, progress_bar=False, device="cpu")
    assert figures["frechet_distance"] > 0 and figures == {
        key: value
        for key, value in json.loads((run.folder / "evaluation.json").read_text()).items()
        if key != "protocol"
    }
    assert run.metrics["protocol"]["evaluation"]["samples"]["seed"] == 5


def test_network_in_memory_is_saved_with_the_run(tmp_path):
    network, schedule = load_network(ASSETS / "digits" / "unet")
    before = weights_hash(network)
    pipe = OneStepPipeline(network, _scheduler(), 250)
    options = {**SMALL, "forget": 3, "checkpointing_steps": 1}
    run = pf.unlearn(pipe, "sfd", output_dir=str(tmp_path / "run"), **options)
    # The preset with images of its size and channels.
    assert run.config["preset"] == "digits" and run.config["forget_classes"] == [3]
    assert run.config["pretrained_model_name_or_path"] == str(tmp_path / "run" / "pretrained")
    saved = resolve(tmp_path / "run" / "pretrained")
    assert weights_hash(saved.network) == run.config["pretrained_sha256"] == before == weights_hash(network)
    assert torch.equal(saved.schedule.alphas_cumprod, schedule.alphas_cumprod)
    # The same as from the folder; resumed without the object.
    folder = pf.unlearn(saved.source, "sfd", output_dir=str(tmp_path / "again"), preset="digits", **options)
    assert weights_hash(folder.model.network) == weights_hash(run.model.network)
    weights = weights_hash(run.model.network)
    (run.folder / "checkpoints" / "checkpoint-2").rename(tmp_path / "last")
    more = {"output_dir": str(run.folder), "resume_from_checkpoint": "latest"}
    run = pf.unlearn(run.folder / "pretrained", "sfd", preset="digits", **more, **options)
    assert weights_hash(run.model.network) == weights
    with pytest.raises(ValueError, match="already has a run"):
        pf.unlearn(pipe, "sfd", output_dir=str(tmp_path / "run"), **options)
    network, _ = load_network(ASSETS / "digits" / "unet")
    with pytest.raises(ValueError, match="schedule"):
        pf.unlearn(network, "sfd", output_dir=str(tmp_path / "bare"), **options)
    run = pf.unlearn(network, "sfd", scheduler=_scheduler(), output_dir=str(tmp_path / "unet"), **options)
    assert weights_hash(run.model.network) == weights


def _scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_pretrained(ASSETS / "digits" / "unet" / "scheduler")


def test_a_stable_diffusion_in_memory(tmp_path):
    from diffusers import StableDiffusionPipeline

    write_stable_diffusion(tmp_path / "sd")
    (tmp_path / "retain.txt").write_text("a dog\na cat\n")
    (tmp_path / "eval.txt").write_text("one\n")
    (tmp_path / "near.txt").write_text("a coat\n")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    options = {"max_train_steps": 1, "sample_steps": 1, "samples_per_prompt": 1, "progress_bar": False, "device": "cpu"}
    options |= {"train_batch_size": 1, "gradient_accumulation_steps": 1, "saliency_batches": 1}
    options |= {"retain_prompts": str(tmp_path / "retain.txt"), "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="forget is not given"):
        pf.unlearn(pipe, **options)
    run = pf.unlearn(pipe, method="pecker", forget="brad pitt", cover="a middle aged man", **options)
    assert run.config["preset"] == "sd15-celebrity" and run.config["concept"] == "brad pitt"
    assert (run.folder / "pretrained" / "text_encoder").is_dir()
    assert run.pipeline.config.t_init == 625 and len(run.pipeline("a dog").images) == 1
    lists = {"prompts": str(tmp_path / "eval.txt"), "near": str(tmp_path / "near.txt"), "nudenet": False}
    lists |= {"images_per_prompt": 1, "near_images_per_prompt": 1, "num_inference_steps": 1}
    figures = pf.evaluate(run, task="nudity", progress_bar=False, device="cpu", **lists)
    assert figures["measured_images"] == 1 and run.metrics["measured_images"] == 1


def test_a_comparison(tmp_path):
    options = {"max_train_steps": 2, "samples_per_class": 2, "progress_bar": False, "output_dir": str(tmp_path / "c")}
    small = {"train_batch_size": 3, "forget_batch_size": 2}
    comparison = pf.compare("digits", methods=["sfd"], seeds=2, set=small, **options)
    assert [run.config["seed"] for run in comparison.runs["sfd"]] == [0, 1]
    assert comparison.runs["sfd"][0].config["options"]["train_batch_size"] == 3
    assert "sfd" in str(comparison) and comparison.report == tmp_path / "c" / "report.md"


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: pf.distil("digits", densty=0.1), TypeError, "no option 'densty'"),
        (lambda: pf.distil("digits", forget=0), TypeError, "no option 'forget'"),
        (lambda: pf.distil("digits", dry_run=True), TypeError, "command line only"),
        (lambda: pf.unlearn("digits", "sfd", distilled="nowhere"), ValueError, "distilled is 'nowhere'"),
        (lambda: pf.unlearn(None), TypeError, "model is None, expected a path, a name"),
        (lambda: pf.unlearn("digits", densty=0.1), TypeError, "no option 'densty'; the nearest is 'density'"),
        (lambda: pf.unlearn("digits", forget="brad pitt"), ValueError, "'brad pitt', expected the number of a class"),
        (lambda: pf.unlearn("sd15-celebrity", forget=[0]), TypeError, "expected a concept"),
        (lambda: pf.unlearn("digits", preset="cifar10"), ValueError, "expected one of the two"),
        (lambda: pf.unlearn("digits", "sdf"), ValueError, "method is 'sdf'"),
        (lambda: pf.unlearn("digits", forget=12), ValueError, "forget_classes is 12"),
        (lambda: pf.unlearn("digits", forget=0, cover=0), ValueError, "cover_class is 0"),
        (lambda: pf.unlearn("digits", dry_run=True), TypeError, "command line only"),
        (lambda: pf.unlearn("svhn", forget=0), ValueError, "'svhn'"),
        (lambda: pf.evaluate("digits", samples_per_clas=3), TypeError, "the nearest is 'samples_per_class'"),
        (lambda: pf.compare("digits", sead=3), TypeError, "no option 'sead'"),
        (lambda: pf.compare("svhn"), ValueError, "preset is 'svhn'"),
        (lambda: pf.Run("nowhere"), ValueError, "folder of a run of unlearning"),
        (lambda: pf.no_such_name, AttributeError, "no_such_name"),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, call, error, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        call()
    assert not any((tmp_path / "runs").rglob("*")) and not set(RUN_FILES) & {path.name for path in tmp_path.iterdir()}


def test_a_network_of_no_preset(tmp_path):
    save_network(tmp_path / "net", tiny_unet(sample_size=12, attention_resolutions=()), NoiseSchedule.linear())
    with pytest.raises(ValueError, match="images of 12 pixels and 1 channels: expected one of digits"):
        pf.unlearn(tmp_path / "net", forget=0)


def test_names_are_imported_lazily():
    assert {"unlearn", "distil", "evaluate", "compare", "Run"} <= {*dir(pf)} and set(pf.__all__) <= {*dir(pf)}
