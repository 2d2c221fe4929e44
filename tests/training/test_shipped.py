"""The networks that come with the package fit their presets and draw what they are asked for."""

import pytest
import torch

from pecker_fast.diffusion import sample_ddim
from pecker_fast.metrics import load_judge
from pecker_fast.models import resolve
from pecker_fast.runs.presets import class_preset


@pytest.mark.parametrize("name", ["digits", "digits16"])
def test_a_shipped_network_draws_what_is_asked(name):
    found = class_preset(name)
    model = resolve(None, shipped=found.network)
    network, schedule, source = model.network, model.schedule, model.source
    assert source == f"shipped:{name}"
    config = found.unet
    assert network.config["sample_size"] == config.sample_size
    assert tuple(network.config["block_out_channels"]) == config.block_out_channels
    labels = torch.arange(config.num_classes).repeat_interleave(6)
    images = sample_ddim(network, schedule, labels, num_inference_steps=20, seed=0, clip_sample=True)
    predicted = load_judge(found.judge)(images.clamp(-1, 1))[0].argmax(1)
    # 97 % and more of thousands, in 50 steps: a network of other weights, or another scaling, draws chance.
    assert (predicted == labels).float().mean() > 0.85
