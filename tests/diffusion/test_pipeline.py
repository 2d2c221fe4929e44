"""OneStepPipeline: its images, its folder, and its use without this package."""

import json

import numpy as np
import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule, OneStepGenerator, sample_one_step
from pecker_fast.diffusion.pipeline import OneStepPipeline
from pecker_fast.diffusion.sampling import _Noise
from pecker_fast.models import load_network, save_one_step_pipeline
from tests import processes
from tests.diffusion.toy import tiny_unet

T_INIT = 250


def expected(unet, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    generator = OneStepGenerator(NoiseSchedule.linear(), T_INIT)
    with torch.no_grad():
        return (generator(unet.eval(), z, labels).clamp(-1, 1) + 1) / 2


def test_draws_the_images_of_the_generator(tmp_path):
    unet = tiny_unet()
    names = {"0": "a", "1": "b", "2": "c"}
    save_one_step_pipeline(tmp_path / "p", unet, NoiseSchedule.linear(), T_INIT)
    scheduler = OneStepPipeline.from_pretrained(tmp_path / "p").scheduler
    OneStepPipeline(unet, scheduler, T_INIT, names).save_pretrained(tmp_path / "p")
    pipe = OneStepPipeline.from_pretrained(tmp_path / "p")
    assert pipe.config.t_init == T_INIT and pipe.config.id2label == names
    # diffusers interprets every list in a hub model's index as a module.
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert {name for name, value in index.items() if isinstance(value, list)} == {"unet", "scheduler"}
    z, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 0, 2, 2])
    images = pipe([0, 2], num_images_per_label=2, latents=z, output_type="pt", batch_size=3).images
    assert (images - expected(unet, z, labels)).abs().max() < 1e-6
    array = pipe(labels, latents=z, output_type="np", return_dict=False)[0]
    assert array.shape == (4, 8, 8, 1) and np.allclose(array[..., 0], images[:, 0].numpy(), atol=1e-6)
    pictures = pipe(1, generator=torch.Generator().manual_seed(3)).images
    again = pipe(1, generator=torch.Generator().manual_seed(3)).images
    assert pictures[0].size == (8, 8) and np.array_equal(np.array(pictures[0]), np.array(again[0]))
    # Unlearning can start from the network in it.
    network, schedule = load_network(tmp_path / "p" / "unet")
    samples = sample_one_step(network, OneStepGenerator(schedule, T_INIT), labels, seed=1)
    images = pipe(labels, latents=_Noise(1, (1, 8, 8)).start(4), output_type="pt").images
    assert (images - (samples + 1) / 2).abs().max() < 1e-6


def test_fresh_process_without_this_package(tmp_path):
    unet = tiny_unet()
    save_one_step_pipeline(tmp_path / "p", unet, NoiseSchedule.linear(), T_INIT)
    z = torch.randn(3, 1, 8, 8)
    np.save(tmp_path / "z.npy", z.numpy())
    code = f"""
import sys
sys.modules["pecker_fast"] = None
import numpy, torch
from diffusers import DiffusionPipeline
folder = {str(tmp_path / "p")!r}
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
z = torch.from_numpy(numpy.load({str(tmp_path / "z.npy")!r}))
pipe.save_pretrained(folder + "-again")
folder += "-again"
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
# Into the folder that it was read from.
pipe.save_pretrained(folder)
images = pipe([2, 0, 1], latents=z, output_type="np").images
numpy.save({str(tmp_path / "images.npy")!r}, images)
"""
    # In another working directory, so that the package cannot be imported.
    process = processes.run(["-c", code], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    images = np.load(tmp_path / "images.npy").transpose(0, 3, 1, 2)
    assert np.abs(images - expected(unet, z, torch.tensor([2, 0, 1])).numpy()).max() < 1e-6


def test_saving_into_the_same_folder_replaces_the_pipeline(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").write_text("a note")
    save_one_step_pipeline(tmp_path / "p", tiny_unet(), NoiseSchedule.linear(), 10)
    unet = tiny_unet()
    save_one_step_pipeline(tmp_path / "p", unet, NoiseSchedule.linear(), T_INIT)
    assert json.loads((tmp_path / "p" / "model_index.json").read_text())["t_init"] == T_INIT
    assert (tmp_path / "p" / "mine.txt").read_text() == "a note"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    network, _ = load_network(tmp_path / "p" / "unet")
    assert torch.equal(network.conv_in.weight, unet.conv_in.weight)


def test_invalid_arguments(tmp_path):
    with pytest.raises(ValueError, match="t_init is 1000"):
        save_one_step_pipeline(tmp_path / "p", tiny_unet(), NoiseSchedule.linear(), 1000)
    assert not (tmp_path / "p").exists()
    save_one_step_pipeline(tmp_path / "p", tiny_unet(), NoiseSchedule.linear(), T_INIT)
    pipe = OneStepPipeline.from_pretrained(tmp_path / "p")
    for arguments, message in (
        ({"class_labels": 3}, "class_labels is 3, expected labels from 0 to 2"),
        ({"class_labels": []}, "class_labels"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type"),
        ({"class_labels": 0, "num_images_per_label": 0}, "num_images_per_label"),
        ({"class_labels": 0, "latents": torch.zeros(2, 1, 8, 8)}, "latents has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    for labels in (1.5, [True], ["cat"], torch.tensor([0.0])):
        with pytest.raises(TypeError, match="class_labels"):
            pipe(labels)
    for t_init in (None, -1, 1000):
        with pytest.raises(ValueError, match=f"t_init is {t_init}"):
            OneStepPipeline(pipe.unet, pipe.scheduler, t_init)
