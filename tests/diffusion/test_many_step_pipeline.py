"""ManyStepPipeline: the images of the samplers, its folder, and its use without this package."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule, Sampler
from pecker_fast.diffusion.many_step_pipeline import ManyStepPipeline
from pecker_fast.diffusion.sampling import _Noise
from pecker_fast.models import load_network, resolve, save_many_step_pipeline
from tests import processes
from tests.diffusion.toy import tiny_unet

SCHEDULE = NoiseSchedule.linear()
LABELS = torch.tensor([0, 0, 2, 2])


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": True},
        {"clip_sample": False, "guidance_scale": 2.5},
        {"kind": "ddpm", "num_inference_steps": 4, "clip_sample": False, "guidance_scale": 1.0},
    ],
)
def test_draws_the_images_of_the_sampler(tmp_path, options):
    unet = tiny_unet(null_label=True)
    sampler = Sampler(**{"kind": "ddim", "num_inference_steps": 3, **options})
    save_many_step_pipeline(tmp_path / "p", unet, SCHEDULE, sampler)
    pipe = ManyStepPipeline.from_pretrained(tmp_path / "p")
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert {name for name, value in index.items() if isinstance(value, list)} == {"unet", "scheduler"}
    z = _Noise(1, (1, 8, 8)).start(4)
    images = pipe([0, 2], num_images_per_label=2, latents=z, output_type="pt", batch_size=3).images
    expected = (sampler.draw(unet.eval(), SCHEDULE, LABELS, 1) + 1) / 2
    if sampler.kind == "ddim":
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    else:
        # Each step adds noise of another generator.
        assert images.shape == expected.shape and not torch.equal(images, expected)
        drawn = [
            pipe(LABELS, generator=torch.Generator().manual_seed(seed), output_type="pt").images for seed in (3, 3, 4)
        ]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        again = ancestral(pipe, drawn[0].shape)
        torch.testing.assert_close(drawn[0], again, rtol=0, atol=1e-5)
    # A folder that is only the pipeline is sampled as the run was.
    model = resolve(tmp_path / "p")
    assert model.sampler() == replace(sampler, guidance_scale=sampler.guidance_scale or 1.0)
    network, schedule = load_network(tmp_path / "p" / "unet")
    torch.testing.assert_close(schedule.alphas_cumprod, SCHEDULE.alphas_cumprod)
    assert torch.equal(network.conv_in.weight, unet.conv_in.weight)
    fewer = pipe(LABELS, latents=z, num_inference_steps=1, output_type="np", return_dict=False)[0]
    assert fewer.shape == (4, 8, 8, 1) and not np.allclose(fewer[..., 0], images[:, 0].numpy())


def ancestral(pipe, shape) -> torch.Tensor:
    """Algorithm 2 of DDPM in float64 with the pipeline's network and generator: mean of the posterior, its variance."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator).double()
    alphas = torch.cat([torch.ones(1, dtype=torch.float64), SCHEDULE._exact])
    times = pipe.scheduler.config.num_train_timesteps // 4
    for t in (3 * times, 2 * times, times, 0):
        now, before = alphas[t + 1], alphas[t + 1 - times] if t else alphas[0]
        with torch.no_grad():
            eps = pipe.unet(x.float(), t, class_labels=LABELS).sample.double()
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        ratio = now / before
        x = (before.sqrt() * (1 - ratio) * x0 + ratio.sqrt() * (1 - before) * x) / (1 - now)
        if t:
            noise = torch.randn(shape, generator=generator).double()
            x = x + ((1 - before) / (1 - now) * (1 - ratio)).sqrt() * noise
    return ((x.clamp(-1, 1) + 1) / 2).float()


def test_fresh_process_without_this_package(tmp_path):
    unet = tiny_unet()
    sampler = Sampler("ddim", num_inference_steps=3, clip_sample=True)
    save_many_step_pipeline(tmp_path / "p", unet, SCHEDULE, sampler)
    z = _Noise(1, (1, 8, 8)).start(4)
    np.save(tmp_path / "z.npy", z.numpy())
    code = f"""
import sys
sys.modules["pecker_fast"] = None
import numpy, torch
from diffusers import DiffusionPipeline
folder = {str(tmp_path / "p")!r}
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
# Into the folder that it was read from.
pipe.save_pretrained(folder)
z = torch.from_numpy(numpy.load({str(tmp_path / "z.npy")!r}))
numpy.save({str(tmp_path / "images.npy")!r}, pipe([0, 0, 2, 2], latents=z, output_type="np").images)
"""
    process = processes.run(["-c", code], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    images = np.load(tmp_path / "images.npy").transpose(0, 3, 1, 2)
    expected = (sampler.draw(unet.eval(), SCHEDULE, LABELS, 1) + 1) / 2
    assert np.abs(images - expected.numpy()).max() < 1e-5


def test_invalid_arguments(tmp_path):
    with pytest.raises(ValueError, match="sampler is 'one_step', expected one of ddim, ddpm"):
        save_many_step_pipeline(tmp_path / "p", tiny_unet(), SCHEDULE, Sampler("one_step", t_init=3))
    assert not (tmp_path / "p").exists()
    save_many_step_pipeline(tmp_path / "p", tiny_unet(), SCHEDULE, Sampler("ddim", num_inference_steps=2))
    pipe = ManyStepPipeline.from_pretrained(tmp_path / "p")
    for arguments, message in (
        ({"class_labels": 3}, "class_labels is 3, expected labels from 0 to 2"),
        ({"class_labels": []}, "class_labels"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type"),
        ({"class_labels": 0, "num_images_per_label": 0}, "num_images_per_label"),
        ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"class_labels": 0, "latents": torch.zeros(2, 1, 8, 8)}, "latents has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    for labels in (1.5, [True], torch.tensor([0.0])):
        with pytest.raises(TypeError, match="class_labels"):
            pipe(labels)
    with pytest.raises(ValueError, match="eval_sampler is 'pndm'"):
        ManyStepPipeline(pipe.unet, pipe.scheduler, "pndm")
