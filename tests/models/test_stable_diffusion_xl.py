"""Stable Diffusion XL's folder: prompts, images against diffusers' pipelines, and the pipelines that a run saves."""

import json
import shutil

import pytest
import torch

from pecker_fast.diffusion import OneStepGenerator, Sampler
from pecker_fast.diffusion.conditioning import POOLED, TIME_IDS
from pecker_fast.diffusion.sampling import _Noise
from pecker_fast.hashing import weights_hash
from pecker_fast.models import (
    LoadedStableDiffusionXL,
    Prediction,
    StableDiffusion,
    StableDiffusionXL,
    read_stable_diffusion,
    resolve_text,
    save_text_pipeline,
)
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.diffusion.tiny_sdxl import LATENTS, POOLED_WIDTH, SIZE, WIDTH, tiny_xl_unet, turbo_scheduler, write_sdxl

PROMPTS = ["", "a dog", "a brad pitt on a mat"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(torch.initial_seed())
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture(scope="module")
def pipe(base):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(base, add_watermarker=False)


def test_prompts_are_encoded_as_by_diffusers(base, pipe):
    source = read_stable_diffusion(base)
    assert isinstance(source, StableDiffusionXL) and source.prediction_type == "epsilon"
    conditioning, truncated = source.encode([*PROMPTS, "x" * 200])
    assert truncated == ["x" * 200] and conditioning.embeddings.shape == (4, 77, WIDTH)
    for row, prompt in enumerate([*PROMPTS, "x" * 200]):
        text, null, pooled, null_pooled = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=True)
        if prompt == "":
            # "No condition" in guidance: zeros, as force_zeros_for_empty_prompt says.
            text, pooled = null, null_pooled
            assert not text.any() and not pooled.any()
        assert torch.allclose(conditioning.embeddings[row], text[0], atol=1e-5), prompt
        assert torch.allclose(conditioning.tensors[POOLED][row], pooled[0], atol=1e-5), prompt
    network = source.network(conditioning.to(dtype=torch.bfloat16), 32)
    sizes = network.table.conditioning.tensors[TIME_IDS]
    assert sizes.tolist() == [[32, 32, 0, 0, 32, 32]] * 4 and network.config["sample_size"] == 16
    assert network.table[torch.tensor([2])].tensors[POOLED].dtype == torch.bfloat16


def test_the_empty_prompt_may_have_its_own_embedding(base, pipe, tmp_path):
    folder = shutil.copytree(base, tmp_path / "own")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    source = read_stable_diffusion(folder)
    text, _, pooled, _ = pipe.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    conditioning, _ = source.encode(PROMPTS)
    assert torch.allclose(conditioning.embeddings[:1], text, atol=1e-5)
    assert torch.allclose(conditioning.tensors[POOLED][:1], pooled, atol=1e-5) and pooled.any()
    # Stored embeddings of the one are not taken for those of the other.
    assert source.text_encoder_hashes() != read_stable_diffusion(base).text_encoder_hashes()


def drawn_by_us(source, z, t_init, prediction=None, resolution=None):
    network = source.network(source.encode(PROMPTS)[0], resolution, prediction=prediction)
    with torch.no_grad():
        return OneStepGenerator(source.schedule, t_init)(network, z, torch.tensor([1, 2])), network


def test_turbo_draws_as_by_diffusers(tmp_path):
    """One step of sdxl-turbo's scheduler is one step at 999."""
    from diffusers import StableDiffusionXLPipeline

    folder = write_sdxl(tmp_path / "sdxl-turbo", turbo_scheduler())
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    z = torch.randn(2, LATENTS, SIZE, SIZE)
    source = read_stable_diffusion(folder)
    latents, _ = drawn_by_us(source, z, 999)
    options = {"guidance_scale": 0.0, "num_inference_steps": 1, "latents": z}
    theirs = pipe(PROMPTS[1:], output_type="latent", **options).images
    assert torch.allclose(latents, theirs, rtol=1e-4, atol=1e-4)
    images = pipe(PROMPTS[1:], output_type="pt", **options).images
    assert torch.allclose(source.decode(latents) / 2 + 0.5, images, atol=1e-4)


def test_lightning_draws_as_by_diffusers(base, pipe):
    """SDXL-Lightning's U-Net of one step predicts x_0 and is drawn by Euler with trailing timesteps."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    z = torch.randn(2, LATENTS, SIZE, SIZE)
    latents, _ = drawn_by_us(read_stable_diffusion(base), z, 999, Prediction("sample"))
    scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", prediction_type="sample"
    )
    theirs = StableDiffusionXLPipeline(**{**pipe.components, "scheduler": scheduler}, add_watermarker=False)
    images = theirs(PROMPTS[1:], guidance_scale=0.0, num_inference_steps=1, latents=z, output_type="latent").images
    assert torch.allclose(latents, images, rtol=1e-4, atol=1e-4)


def test_dmd2_draws_as_by_diffusers(base, pipe):
    """DMD2's U-Net of one step is fed noise of variance 1 at timestep 399, by LCM's scheduler."""
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    z = torch.randn(2, LATENTS, SIZE, SIZE)
    latents, _ = drawn_by_us(read_stable_diffusion(base), z, 399, Prediction(unit_noise=True))
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    theirs = StableDiffusionXLPipeline(**{**pipe.components, "scheduler": scheduler}, add_watermarker=False)
    options = {"guidance_scale": 0, "num_inference_steps": 1, "timesteps": [399], "latents": z}
    images = theirs(PROMPTS[1:], output_type="latent", **options).images
    assert torch.allclose(latents, images, rtol=1e-4, atol=1e-4)


def test_many_steps_with_guidance_draw_as_by_diffusers(base, pipe):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    source = read_stable_diffusion(base)
    network = source.network(source.encode(PROMPTS)[0])
    sampler = Sampler("ddim", num_inference_steps=4, guidance_scale=7.5)
    ours = sampler.draw(network, source.schedule, [1, 2], 3)
    z = _Noise(3, (LATENTS, SIZE, SIZE)).start(2)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    theirs = StableDiffusionXLPipeline(**{**pipe.components, "scheduler": scheduler}, add_watermarker=False)
    expected = theirs(PROMPTS[1:], num_inference_steps=4, guidance_scale=7.5, latents=z, output_type="latent").images
    assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-3)


KINDS = [
    (625, Prediction()),
    (999, Prediction()),
    (999, Prediction("sample")),
    (399, Prediction(unit_noise=True)),
    (999, Prediction("v_prediction")),
]


@pytest.mark.parametrize(("t_init", "kind"), KINDS)
def test_saved_pipelines_draw_the_images_of_the_generator(base, tmp_path, t_init, kind):
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

    source = read_stable_diffusion(base)
    z = torch.randn(2, LATENTS, SIZE, SIZE)
    latents, network = drawn_by_us(source, z, t_init, kind)
    save_text_pipeline(tmp_path / "run", network.unet, source, t_init, kind)
    run = str(tmp_path / "run")
    pipe = DiffusionPipeline.from_pretrained(run, custom_pipeline=run, trust_remote_code=True)
    drawn = pipe(PROMPTS[1:], latents=z, output_type="latent").images
    assert torch.allclose(drawn, latents, rtol=1e-4, atol=1e-4)
    images = pipe(PROMPTS[1:], latents=z, output_type="pt", batch_size=1).images
    assert torch.allclose(images, source.decode(latents) / 2 + 0.5, atol=1e-4)
    assert pipe("a dog", height=32, width=16, output_type="np").images.shape == (1, 32, 16, 3)
    assert len(pipe("a dog", num_images_per_prompt=3).images) == 3
    # The folder is an SDXL that is read as it was saved.
    again = resolve_text(run)
    assert again.t_init == t_init and again.parts.prediction == kind
    assert torch.allclose(again.parts.schedule._exact, source.schedule._exact, rtol=1e-6)
    other, _ = drawn_by_us(again.parts, z, t_init)
    assert torch.allclose(other, latents, rtol=1e-4, atol=1e-4)
    # Where diffusers has a scheduler that draws in this step, its own pipeline gives the same images.
    plain = StableDiffusionXLPipeline.from_pretrained(run, add_watermarker=False)
    if t_init != 625:
        steps = {"timesteps": [399]} if kind.unit_noise else {}
        options = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent", **steps}
        assert torch.allclose(plain(PROMPTS[1:], latents=z, **options).images, latents, rtol=1e-3, atol=1e-3)


def test_a_model_of_many_steps_is_saved_as_diffusers_pipeline(base, tmp_path):
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

    source = read_stable_diffusion(base)
    save_text_pipeline(tmp_path / "run", source.load_unet(), source, None)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipe) is StableDiffusionXLPipeline and pipe.config.force_zeros_for_empty_prompt
    assert pipe("a dog", num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_float16_images_have_no_nan(base, tmp_path):
    """Activations of the VAE that overflow in float16 are decoded in float32, as its configuration demands."""
    from diffusers import DiffusionPipeline

    source = read_stable_diffusion(base)
    save_text_pipeline(tmp_path / "run", source.load_unet(), source, 999)
    run = str(tmp_path / "run")
    pipe = DiffusionPipeline.from_pretrained(run, custom_pipeline=run, trust_remote_code=True)
    with torch.no_grad():
        # The weights fit float16, the activations do not; the next layer normalises them.
        weight = pipe.vae.decoder.conv_in.weight
        weight.copy_((weight * (3e4 / weight.abs().max())).half())
    latents = torch.randn(2, LATENTS, SIZE, SIZE)
    exact = source.decode(latents, vae=pipe.vae)
    half = pipe.vae.half()
    assert not half.decode(latents.half() / 0.5).sample.isfinite().all()
    assert half.config.force_upcast
    pipe.unet.half(), pipe.text_encoder.half(), pipe.text_encoder_2.half()
    images = pipe._decode(latents)
    assert images.isfinite().all() and half.dtype == torch.float16
    # The weights of the file were rounded to float16 before.
    assert torch.allclose(images.clamp(-1, 1), exact, atol=0.05)
    assert pipe("a dog", output_type="pt").images.isfinite().all()


def test_files_of_float16_alone_are_read(base, pipe, tmp_path):
    import copy

    half = copy.deepcopy(pipe).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    source, exact = read_stable_diffusion(tmp_path / "half"), read_stable_diffusion(base)
    for name in ("load_unet", "load_vae", "load_text_encoder"):
        ours, theirs = getattr(source, name)(), getattr(exact, name)()
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
        assert all(
            torch.equal(a, b.half().float()) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )


def test_a_pipeline_in_memory_equals_the_folder(base, pipe):
    memory, folder = resolve_text(pipe), resolve_text(base)
    assert isinstance(memory.parts, LoadedStableDiffusionXL) and memory.source == "memory:StableDiffusionXLPipeline"
    (a, _), (b, _) = (model.parts.encode(PROMPTS) for model in (memory, folder))
    assert all(torch.equal(value, b.tensors[name]) for name, value in a.items())
    assert weights_hash(memory.load_unet()) == weights_hash(folder.load_unet())
    assert len(memory.parts.text_encoder_hashes()) == 3 and memory.parts.zeros_for_empty_prompt


def test_invalid_models(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    shutil.rmtree(broken / "tokenizer_2")
    with pytest.raises(ValueError, match="is not the folder of a Stable Diffusion XL: it has no tokenizer_2"):
        read_stable_diffusion(broken)
    plain = write_stable_diffusion(tmp_path / "plain")
    shutil.copytree(base / "text_encoder_2", plain / "text_encoder_2")
    shutil.copytree(base / "tokenizer_2", plain / "tokenizer_2")
    with pytest.raises(ValueError, match="its U-Net takes no pooled embedding"):
        read_stable_diffusion(plain)
    source = read_stable_diffusion(base)
    conditioning, _ = source.encode(PROMPTS)
    with pytest.raises(ValueError, match="pooled embeddings are missing"):
        source.network(conditioning.embeddings)
    narrow = tiny_xl_unet(projection_class_embeddings_input_dim=POOLED_WIDTH - 1 + 6 * 4)
    with pytest.raises(ValueError, match=f"{POOLED_WIDTH} wide, expected the width of the U-Net's, {POOLED_WIDTH - 1}"):
        source.network(conditioning, unet=narrow)
    one = StableDiffusion(write_stable_diffusion(tmp_path / "one", cross_attention_dim=WIDTH))
    with pytest.raises(ValueError, match="pooled embeddings, which this U-Net does not take"):
        one.network(conditioning)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": 3}, TypeError, "prompt is 3"),
        ({"prompt": "a", "height": 3}, ValueError, "height is 3, expected a multiple of 2"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 3, 3)}, ValueError, "latents has shape"),
        ({"prompt": "a", "batch_size": 0}, ValueError, "batch_size is 0"),
    ],
)
def test_invalid_calls(base, arguments, error, message):
    source = read_stable_diffusion(base)
    pipe = source.build_pipeline(source.load_unet(), 625, Prediction())
    with pytest.raises(error, match=message):
        pipe(**arguments)
    with pytest.raises(ValueError, match="t_init is 1000"):
        save_text_pipeline("nowhere", source.load_unet(), source, 1000)
