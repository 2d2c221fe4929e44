"""Stable Diffusion's folder: parts, prompts, images, and the one-step pipeline that a run saves."""

import json
import shutil

import pytest
import torch

from pecker_fast.diffusion import OneStepGenerator
from pecker_fast.models import StableDiffusion, load_text_unet, save_text_network, save_text_pipeline
from tests import processes
from tests.diffusion.tiny_sd import LATENTS, SIZE, WIDTH, write_stable_diffusion


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(torch.initial_seed())
    root = tmp_path_factory.mktemp("sd")
    return {kind: write_stable_diffusion(root / kind, kind) for kind in ("epsilon", "v_prediction")}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_pipeline_draws_the_images_of_the_generator(folders, kind, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    source = StableDiffusion(folders[kind])
    prompts = ["", "a dog", "a man"]
    embeddings, _ = source.encode(prompts)
    network = source.network(embeddings)
    assert network.prediction_type == kind == source.prediction_type
    save_text_pipeline(tmp_path / "run", network.unet, source, 625)
    z = torch.randn(2, LATENTS, SIZE, SIZE)
    with torch.no_grad():
        latents = OneStepGenerator(source.schedule, 625)(network, z, torch.tensor([1, 2]))
    images = source.decode(latents)
    assert images.shape == (2, 3, 2 * SIZE, 2 * SIZE)
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "run", custom_pipeline=str(tmp_path / "run"), trust_remote_code=True
    )
    from_pipe = pipe(prompts[1:], latents=z, output_type="pt").images
    assert torch.allclose(from_pipe, images / 2 + 0.5, atol=1e-4)
    assert torch.allclose(pipe(prompts[1:], latents=z, output_type="latent").images, latents, rtol=1e-4, atol=1e-4)
    # In batches, from embeddings, with two images for each.
    both = pipe(
        prompt_embeds=embeddings.embeddings[1:],
        latents=z.repeat_interleave(2, 0),
        num_images_per_prompt=2,
        batch_size=3,
    )
    assert len(both.images) == 4 and both.images[0].size == (2 * SIZE, 2 * SIZE)
    assert pipe("a dog", height=32, width=16, output_type="np").images.shape == (1, 32, 16, 3)
    # The run's folder is itself a Stable Diffusion, and its U-Net fits StableDiffusionPipeline.
    again = StableDiffusion(tmp_path / "run")
    assert again.prediction_type == kind
    multi_step = StableDiffusionPipeline.from_pretrained(folders[kind], unet=again.load_unet(), safety_checker=None)
    assert multi_step("a dog", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 2 * SIZE, 2 * SIZE)


def test_pipeline_without_this_package(folders, tmp_path):
    source = StableDiffusion(folders["epsilon"])
    save_text_pipeline(tmp_path / "run", source.load_unet(), source, 625)
    code = (
        "import sys; from diffusers import DiffusionPipeline; f = sys.argv[1]\n"
        "pipe = DiffusionPipeline.from_pretrained(f, custom_pipeline=f, trust_remote_code=True)\n"
        "print(len(pipe(['a dog', 'a man']).images), 'pecker_fast' in sys.modules)\n"
    )
    # In another working directory, so that the package cannot be imported.
    process = processes.run(["-c", code, str(tmp_path / "run")], cwd=tmp_path)
    assert process.stdout.split()[-2:] == ["2", "False"], process.stderr


@pytest.fixture(scope="module")
def pipeline(folders, tmp_path_factory):
    from pecker_fast.diffusion.text_pipeline import OneStepTextPipeline

    folder, source = tmp_path_factory.mktemp("pipeline"), StableDiffusion(folders["epsilon"])
    save_text_pipeline(folder, source.load_unet(), source, 625)
    return OneStepTextPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one"),
        ({"prompt": 3}, TypeError, "prompt is 3"),
        ({"prompt": ["a", 3]}, TypeError, "prompt"),
        ({"prompt": "a", "height": 15}, ValueError, "height is 15"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 3, 3)}, ValueError, "latents has shape"),
        ({"prompt": "a", "output_type": "jpg"}, ValueError, "output_type"),
        ({"prompt": "a", "batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_invalid_calls(pipeline, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline(**arguments)


def test_sizes(folders):
    source = StableDiffusion(folders["epsilon"])
    assert source.vae_scale_factor == 2 and source.latent_size(None) == SIZE and source.latent_size(32) == 16
    with pytest.raises(ValueError, match="resolution is 30, expected a multiple of 4"):
        source.latent_size(30)
    network = source.network(source.encode([""])[0], 32)
    assert network.config["sample_size"] == 16 and network.table.embeddings.shape == (1, 77, WIDTH)
    assert source.encode(["", "a"], dtype=torch.bfloat16)[0].embeddings.dtype == torch.bfloat16


def test_half_precision_weights_are_read(folders, tmp_path):
    unet = load_text_unet(folders["epsilon"] / "unet")
    unet.half().save_pretrained(tmp_path, variant="fp16")
    again = load_text_unet(tmp_path)
    assert again.dtype == torch.float32
    for a, b in zip(again.parameters(), unet.parameters(), strict=True):
        assert torch.equal(a, b.float())


def test_networks_are_saved_and_read(folders, tmp_path):
    source = StableDiffusion(folders["epsilon"])
    network = source.network(source.encode([""])[0])
    with torch.no_grad():
        network.unet.conv_in.bias.add_(1)
    save_text_network(tmp_path / "unet", network)
    again = load_text_unet(tmp_path / "unet")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))


def test_invalid_folders(folders, tmp_path):
    with pytest.raises(ValueError, match="no unet, vae, text_encoder, tokenizer, scheduler"):
        StableDiffusion(tmp_path)
    broken = shutil.copytree(folders["epsilon"], tmp_path / "sd")
    path = broken / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "prediction_type": "flow_prediction"}))
    with pytest.raises(
        ValueError, match="prediction_type is 'flow_prediction', expected 'epsilon' or 'v_prediction' or 'sample'"
    ):
        StableDiffusion(broken)
    path.write_text(json.dumps({**config, "rescale_betas_zero_snr": True}))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        StableDiffusion(broken)
    path.write_text(json.dumps(config))
    source = StableDiffusion(broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors weights"):
        source.load_unet()
    with pytest.raises(ValueError, match="AutoencoderKL, expected a UNet2DConditionModel"):
        load_text_unet(broken / "vae")
