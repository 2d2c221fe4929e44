"""The networks shipped with the package fit their presets and draw the right classes."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from pecker_fast.diffusion import predict, pretrained_sampler
from pecker_fast.hashing import weights_hash
from pecker_fast.metrics import load_judge
from pecker_fast.models import network_folder, resolve
from pecker_fast.runs.distilled import Distilled
from pecker_fast.runs.presets import class_preset
from pecker_fast.runs.task import unlearn_arguments
from tests.commands.case import ASSETS


@pytest.mark.parametrize("name", ["digits", "digits16", "mnist"])
def test_shipped_network_draws_the_requested_class(name):
    preset = class_preset(name)
    model = resolve(None, shipped=preset.network)
    network, schedule, source = model.network, model.schedule, model.source
    assert source == f"shipped:{name}"
    config = preset.unet
    assert network.config["sample_size"] == config.sample_size
    assert tuple(network.config["block_out_channels"]) == config.block_out_channels
    labels = torch.arange(config.num_classes).repeat_interleave(6)
    images = pretrained_sampler(schedule, network).draw(network, schedule, labels, 0)
    predicted = load_judge(preset.judge)(images.clamp(-1, 1))[0].argmax(1)
    # At least 97 % of a thousand images or more; with wrong weights or another scaling, chance level.
    assert (predicted == labels).float().mean() > 0.85


@pytest.mark.parametrize(
    ("name", "accuracy", "worst", "recorded_accuracy"),
    [("digits", 0.96, 0.85, 97.5), ("digits16", 0.94, 0.75, 97.5), ("mnist", 0.94, 0.8, 97.0)],
)
def test_shipped_distilled_networks_draw_the_requested_class(name, accuracy, worst, recorded_accuracy):
    distilled = Distilled.read(f"shipped:{name}")
    teacher, options = resolve(None, shipped=name).network, unlearn_arguments(name, "sfd").options
    assert distilled.t_init == options.t_init
    distilled.check_base(weights_hash(teacher))
    metrics = json.loads((distilled.folder / "metrics.json").read_text())
    models = {key: resolve(distilled.networks[f"initial_{key}"]) for key in ("generator", "score")}
    for (key, model), recorded in zip(models.items(), ("weights_sha256", "score_sha256"), strict=True):
        # Loading is exact, and these are the networks that were measured.
        saved = load_file(network_folder(distilled.networks[f"initial_{key}"]) / "diffusion_pytorch_model.safetensors")
        weights = model.network.state_dict()
        assert weights.keys() == saved.keys() and {value.dtype for value in saved.values()} == {torch.float16}
        assert all(torch.equal(saved[name].float(), value) for name, value in weights.items())
        assert weights_hash(model.network) == metrics[recorded]
    model, each = models["generator"], 60
    labels = torch.arange(10).repeat_interleave(each)
    images = model.sampler().draw(model.network, model.schedule, labels, 3)
    right = load_judge(class_preset(name).judge)(images)[0].argmax(1) == labels
    # Over eight seeds 97.7 to 99.0 and 95.8 to 98.7 %, of the worst class 88 to 97 and 82 to 95 %.
    assert right.float().mean() > accuracy and right.view(10, each).float().mean(1).min() > worst
    assert metrics["retain_accuracy"] > recorded_accuracy
    assert metrics["frechet_distance"] < metrics["frechet_real_split"]
    # psi follows the generator: on its samples, the error of its prediction is below the teacher's.
    t = torch.full((len(labels),), 250)
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    x_t = model.schedule.add_noise(images, eps, t)
    with torch.no_grad():
        errors = [
            (predict(x, model.schedule, x_t, t, labels) - eps).square().mean()
            for x in (models["score"].network, teacher)
        ]
    assert errors[0] < errors[1]


def test_shipped_network_of_mnist_is_recognised():
    """As measured when it was distilled, in every class."""
    metrics = json.loads((ASSETS / "mnist" / "distilled" / "metrics.json").read_text())
    assert metrics["before_retain_accuracy"] >= 97
    assert min(row["accuracy_before"] for row in metrics["by_class"]["classes"]) >= 95


def test_shipped_distilled_networks_are_small():
    folders = [ASSETS / name / "distilled" for name in ("digits", "digits16")]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert 1_000_000 < sum(file.stat().st_size for file in files) < 6_000_000
    larger = [file for file in (ASSETS / "mnist").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in larger) <= 12_000_000
    files += larger
    # Nothing about the machine that made them.
    for file in files:
        assert file.suffix == ".safetensors" or not re.search(r'"~?/', file.read_text()), file
