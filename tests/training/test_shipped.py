"""The networks that come with the package fit their presets and draw the right classes."""

import pytest
import torch

from pecker_fast.diffusion import sample_ddim
from pecker_fast.metrics import load_judge
from pecker_fast.models import resolve
from pecker_fast.runs.presets import class_preset


@pytest.mark.parametrize("name", ["digits", "digits16"])
def test_a_shipped_network_draws_what_is_asked(name):
    preset = class_preset(name)
    model = resolve(None, shipped=preset.network)
    network, schedule, source = model.network, model.schedule, model.source
    assert source == f"shipped:{name}"
    config = preset.unet
    assert network.config["sample_size"] == config.sample_size
    assert tuple(network.config["block_out_channels"]) == config.block_out_channels
    labels = torch.arange(config.num_classes).repeat_interleave(6)
    images = sample_ddim(network, schedule, labels, num_inference_steps=20, seed=0, clip_sample=True)
    predicted = load_judge(preset.judge)(images.clamp(-1, 1))[0].argmax(1)
    # At least 97 % of thousands of images in 50 steps; with wrong weights or another scaling, chance level.
    assert (predicted == labels).float().mean() > 0.85
