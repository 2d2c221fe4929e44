"""Class-conditional networks that do not return the noise: saved, read by diffusers, and drawn alike."""

import pytest
import torch

from pecker_fast.diffusion import OneStepGenerator, Sampler
from pecker_fast.models import resolve, save_result
from tests.diffusion.parametrisations import schedule_of
from tests.diffusion.toy import tiny_unet

T_INIT = 20


def pipeline_of(folder):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow", "edm"])
def test_one_step(kind, tmp_path):
    schedule, unet = schedule_of(kind), tiny_unet()
    save_result(tmp_path / "run", unet, schedule, Sampler("one_step", t_init=T_INIT))
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        expected = OneStepGenerator(schedule, T_INIT)(unet, z, labels).clamp(-1, 1)
    images = pipeline_of(tmp_path / "run")(labels, latents=z, output_type="pt").images
    assert torch.allclose(2 * images - 1, expected, atol=1e-5) and (expected.abs() < 1).any()
    model = resolve(tmp_path / "run")
    assert model.schedule.agrees(schedule) and model.sampler() == Sampler("one_step", t_init=T_INIT)
    drawn = [s.draw(n, c, labels, 3) for s, n, c in ((model.sampler(), model.network, model.schedule),)]
    assert torch.allclose(drawn[0], Sampler("one_step", t_init=T_INIT).draw(unet, schedule, labels, 3), atol=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_many_steps(kind, tmp_path):
    schedule, unet = schedule_of(kind), tiny_unet()
    sampler = Sampler("ddim", num_inference_steps=5, clip_sample=True)
    save_result(tmp_path / "run", unet, schedule, sampler)
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        expected = sampler.through(unet, schedule, z, labels).clamp(-1, 1)
    images = pipeline_of(tmp_path / "run")(labels, latents=z, output_type="pt").images
    assert torch.allclose(2 * images - 1, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["flow", "edm"])
def test_many_steps_of_other_schedules_are_saved_as_a_network(kind, tmp_path):
    schedule, unet = schedule_of(kind), tiny_unet()
    sampler = Sampler("ddim", num_inference_steps=5)
    save_result(tmp_path / "run", unet, schedule, sampler)
    model = resolve(tmp_path / "run")
    assert model.schedule.agrees(schedule) and not (tmp_path / "run" / "model_index.json").exists()
    drawn = sampler.draw(model.network, model.schedule, [0, 1], 3)
    assert torch.equal(drawn, sampler.draw(unet, schedule, [0, 1], 3))
