"""Forgetting a class of a consistency model, from its folder to a folder that diffusers reads."""

import json
import shutil

import pytest
import torch
from PIL import Image

import pecker_fast as pf
from pecker_fast.models import resolve
from pecker_fast.runs.classes.names import published_names
from tests.models.tiny_consistency import SIZE, write_consistency_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(torch.initial_seed())
    return write_consistency_model(tmp_path_factory.mktemp("consistency") / "model")


def pipeline_of(folder):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(folder, z, labels) -> torch.Tensor:
    """What diffusers draws in one step, in [-1, 1]."""
    images = pipeline_of(folder)(len(z), class_labels=labels, latents=z, output_type="pt").images
    return 2 * images - 1


def test_one_step_samples_are_those_of_the_pipeline(model):
    resolved = resolve(model)
    assert type(pipeline_of(model)).__name__ == "ConsistencyModelPipeline"
    sampler = resolved.sampler()
    assert sampler.kind == "one_step" and sampler.t_init == 39
    z, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 4, 2])
    with torch.no_grad():
        ours = sampler.through(resolved.network, resolved.schedule, z, labels).clamp(-1, 1)
    theirs = drawn(model, z, labels)
    assert torch.allclose(ours, theirs, atol=1e-5) and (ours.abs() < 1).float().mean() > 0.5
    assert not torch.allclose(theirs[0], drawn(model, z[:1], torch.tensor([3]))[0], atol=1e-3)


def run(model, folder, method="patch", **options):
    values = {"max_train_steps": 3, "train_batch_size": 2, "score_learning_rate": 1e-3, "checkpointing_steps": 2}
    if method == "patch":
        values |= {"saliency_chunks": 2, "saliency_chunk_size": 2, "density": 0.2}
    elif method == "pecker":
        values |= {"saliency_batch_size": 2, "saliency_batches": 1}
    values |= {"generator_learning_rate": 1e-3, "ema_decay": 0.5, "progress_bar": False, **options}
    return pf.unlearn(model, preset="imagenet64", method=method, forget=[1], cover=2, output_dir=folder, **values)


@pytest.mark.parametrize("method", ["patch", "pecker", "sfd"])
def test_a_class_is_forgotten(model, tmp_path, method):
    run(str(model), tmp_path / "run", method)
    folder = tmp_path / "run"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ConsistencyModelPipeline"
    pipeline = pipeline_of(folder)
    assert pipeline.scheduler.config.num_train_timesteps == 40
    z, labels = torch.randn(3, 3, SIZE, SIZE), torch.tensor([1, 0, 4])
    resolved = resolve(folder)
    with torch.no_grad():
        ours = resolved.sampler().through(resolved.network, resolved.schedule, z, labels).clamp(-1, 1)
    assert torch.allclose(ours, drawn(folder, z, labels), atol=1e-5)
    assert not torch.allclose(ours, drawn(model, z, labels), atol=1e-4)
    with Image.open(folder / "samples" / "before_after.png") as picture:
        assert picture.width > picture.height > 5 * SIZE


def test_a_run_is_resumed_bit_for_bit(model, tmp_path):
    run(str(model), tmp_path / "whole", "sfd")
    run(str(model), tmp_path / "run", "sfd")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-3")
    run(str(model), tmp_path / "run", "sfd", resume_from_checkpoint="latest")
    one, two = (resolve(tmp_path / name).network.state_dict() for name in ("whole", "run"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_network_of_an_edm_teacher_with_the_generator(model, tmp_path):
    teacher = write_consistency_model(tmp_path / "teacher")
    run(str(teacher), tmp_path / "run", "sfd", initial_generator=str(model), max_train_steps=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["initial_generator_sha256"] != config["pretrained_sha256"]
    z, labels = torch.randn(2, 3, SIZE, SIZE), torch.tensor([0, 3])
    # A step of 1e-3 from the generator, not from the teacher.
    distances = [(drawn(tmp_path / "run", z, labels) - drawn(x, z, labels)).abs().mean() for x in (model, teacher)]
    assert distances[0] < 0.3 * distances[1]
    other = write_consistency_model(tmp_path / "other", sigma_max=40.0)
    with pytest.raises(ValueError, match=r"initial_generator is .* has other noise levels or predictions"):
        run(str(model), tmp_path / "none", "sfd", initial_generator=str(other))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("esd", {}, "method is 'esd', which trains a diffusion model, but the pretrained network draws in one step"),
        ("sfd", {"t_init": 20}, "t_init is 20, expected 39: CMStochasticIterativeScheduler draws in one step"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(model, tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        pf.unlearn(
            str(model), preset="imagenet64", method=method, output_dir=tmp_path / "run", forget=[1], cover=2, **options
        )
    assert not (tmp_path / "run").exists()


def test_classes_of_imagenet_have_names(model, tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"num_class_embeds": 1000}))
    names = published_names("imagenet64", str(tmp_path))
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    assert len(set(names)) == 1000
    assert published_names("imagenet64", str(model)) == published_names("cifar10", str(tmp_path)) == ()
