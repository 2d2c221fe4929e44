"""Sampler: samples bit-identical to the functions', gradients of z, its description in files, invalid options."""

from dataclasses import replace

import pytest
import torch

from pecker_fast.diffusion import (
    NoiseSchedule,
    OneStepGenerator,
    Sampler,
    ddim_through,
    sample_ddim,
    sample_ddpm,
    sample_one_step,
)
from pecker_fast.diffusion.sld import SLD_CONFIGS, sample_sld

from .test_sld import LatentNetwork
from .toy import tiny_unet

SCHEDULE = NoiseSchedule.linear(100, 1e-3, 0.1)
LABELS = torch.tensor([0, 1, 2, 0, 1])
SLD = {"num_inference_steps": 6, "sld": "medium", "safety_text": "a weapon"}


@pytest.mark.parametrize(("guidance_scale", "seed"), [(None, 7), (1.0, 7), (2.5, [5, 3, 5, 9, 0])])
def test_draws_the_samples_of_the_functions(guidance_scale, seed):
    network = tiny_unet(null_label=True)
    guided = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    common = {"seed": seed, "batch_size": 2, **guided}
    one_step = Sampler("one_step", t_init=44, batch_size=2, **guided)
    expected = sample_one_step(network, OneStepGenerator(SCHEDULE, 44), LABELS, **common)
    assert torch.equal(one_step.draw(network, SCHEDULE, LABELS, seed), expected)
    assert torch.equal(one_step.at(7).draw(network, SCHEDULE, LABELS, seed), sample_one_step(
        network, OneStepGenerator(SCHEDULE, 7), LABELS, **common
    ))  # fmt: skip
    for kind, draw in (("ddim", sample_ddim), ("ddpm", sample_ddpm)):
        for clip_sample in (None, True, False):
            sampler = Sampler(kind, num_inference_steps=4, clip_sample=clip_sample, batch_size=2, **guided)
            expected = draw(network, SCHEDULE, LABELS, 4, clip_sample=clip_sample, **common)
            assert torch.equal(sampler.draw(network, SCHEDULE, LABELS, seed), expected), (kind, clip_sample)
    samples = Sampler("ddpm", batch_size=2, **guided).draw(network, NoiseSchedule.linear(5), LABELS, seed)
    assert torch.equal(samples, sample_ddpm(network, NoiseSchedule.linear(5), LABELS, **common))


@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_latents(guidance_scale):
    network = LatentNetwork()
    labels = [1, 3, 1]
    guided = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    sampler = Sampler("ddim", num_inference_steps=6, batch_size=2, **guided)
    expected = sample_ddim(network, SCHEDULE, labels, 6, seed=5, batch_size=2, **guided)
    assert torch.equal(sampler.draw(network, SCHEDULE, labels, 5), expected) and expected.abs().max() > 1
    steered = Sampler("sld", safety_label=2, batch_size=2, **SLD, **guided)
    expected = sample_sld(network, SCHEDULE, labels, 2, SLD_CONFIGS["medium"], 6, seed=5, batch_size=2, **guided)
    assert torch.equal(steered.draw(network, SCHEDULE, labels, 5), expected)
    with pytest.raises(ValueError, match="safety_label is not given"):
        replace(steered, safety_label=None).draw(network, SCHEDULE, labels, 5)


def test_through():
    network = tiny_unet(null_label=True)
    z, labels = torch.randn(3, 1, 8, 8, requires_grad=True), torch.tensor([0, 1, 2])
    one_step = Sampler("one_step", t_init=44, guidance_scale=2.0)
    images = one_step.through(network, SCHEDULE, z, labels)
    expected = OneStepGenerator(SCHEDULE, 44).through(network, z, labels, guidance_scale=2.0)
    assert torch.equal(images, expected)
    ddim = Sampler("ddim", num_inference_steps=4)
    assert torch.equal(ddim.through(network, SCHEDULE, z, labels), ddim_through(network, SCHEDULE, z, labels, 4))
    # From the initial noise of ``draw`` it draws the same samples, also with guidance and without clipping.
    generator = torch.Generator().manual_seed(5)
    torch.randint(2**32, (), generator=generator)
    z = torch.stack([torch.randn(1, 8, 8, generator=generator) for _ in labels]).requires_grad_()
    for sampler in (ddim, one_step, replace(ddim, guidance_scale=2.0, clip_sample=False)):
        images = sampler.through(network, SCHEDULE, z, labels)
        assert torch.equal(images.clamp(-1, 1), sampler.draw(network, SCHEDULE, labels, 5))
        assert torch.autograd.grad(images.sum(), z)[0].abs().max() > 0
    for sampler in (Sampler("ddpm", num_inference_steps=4), Sampler("sld", safety_label=1, **SLD)):
        with pytest.raises(ValueError, match=f"sampler is '{sampler.kind}', expected one_step or ddim"):
            sampler.through(network, SCHEDULE, z, labels)


def test_description_in_files():
    """Sample caches are named by a hash of ``describe``: another key would lose those of earlier versions."""
    one_step, ddim = Sampler("one_step", t_init=250), Sampler("ddim", num_inference_steps=50)
    many = Sampler("ddpm", num_inference_steps=1000, guidance_scale=1.0, clip_sample=False)
    steered = Sampler("sld", guidance_scale=7.5, safety_label=3, **SLD)
    assert one_step.describe() == {"sampler": "one_step", "t_init": 250, "num_inference_steps": None}
    assert ddim.describe() == {"sampler": "ddim", "t_init": None, "num_inference_steps": 50}
    assert many.describe() == {
        "sampler": "ddpm",
        "t_init": None,
        "num_inference_steps": 1000,
        "guidance_scale": 1.0,
        "clip_sample": False,
    }
    assert steered.describe() == {"sampler": "sld", "t_init": None, "guidance_scale": 7.5, **SLD}
    assert one_step.summary() == {"sampler": "one_step", "sampling_steps": 1}
    assert many.summary() == {"sampler": "ddpm", "sampling_steps": 1000, "guidance_scale": 1.0}
    names = [sampler.name for sampler in (one_step, ddim, many, steered, Sampler("ddpm"))]
    assert names == [
        "one step at 250",
        "DDIM, 50 steps",
        "DDPM, 1000 steps",
        "SLD (medium), 6 steps",
        "DDPM, all steps",
    ]
    assert Sampler.one_step_or_ddim(250, 50) == one_step and Sampler.one_step_or_ddim(None, 50) == ddim


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "euler"}, "sampler is 'euler', expected one of one_step, ddim, ddpm, sld"),
        ({"kind": "one_step"}, "t_init is not given"),
        ({"kind": "one_step", "t_init": -1}, "t_init is -1"),
        ({"kind": "one_step", "t_init": 3, "num_inference_steps": 2}, "num_inference_steps is 2"),
        ({"kind": "one_step", "t_init": 3, "clip_sample": True}, "clip_sample is True"),
        ({"kind": "ddim"}, "num_inference_steps is not given"),
        ({"kind": "ddim", "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"kind": "ddim", "num_inference_steps": 4, "t_init": 3}, "t_init is 3, but the sampler ddim has none"),
        ({"kind": "ddpm", "guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"kind": "ddpm", "batch_size": 0}, "batch_size is 0"),
        ({"kind": "sld", **SLD, "sld": "hard"}, "sld is 'hard', expected one of weak"),
        ({"kind": "sld", **SLD, "safety_text": None}, "safety_text is not given"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**options)


def test_check_against_the_schedule():
    Sampler("one_step", t_init=99).check(100)
    Sampler("ddim", num_inference_steps=100).check(100)
    Sampler("ddpm").check(100)
    with pytest.raises(ValueError, match="t_init is 100, expected from 0 to 99"):
        Sampler("one_step", t_init=100).check(100)
    with pytest.raises(ValueError, match="num_inference_steps is 101"):
        Sampler("ddim", num_inference_steps=101).check(100)
