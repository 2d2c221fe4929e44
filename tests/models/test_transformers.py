"""Transformers with flow matching: read, called, drawn and saved as their own pipelines do."""

import copy
import json
import shutil

import pytest
import torch

from pecker_fast.diffusion import OneStepGenerator, PromptTable, TextConditioned, predict, sample_ddim
from pecker_fast.diffusion.conditioning import EMBEDDINGS, Conditioning
from pecker_fast.models import conditioning_of, resolve_text, save_text_pipeline
from pecker_fast.models.transformers import TRANSFORMERS
from tests.diffusion.parametrisations import schedule_of
from tests.models.tiny_transformers import WRITERS, class_of, latents_of, one_step_options, sana_transformer

PROMPTS = ["", "a dog", "a man and a dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(torch.initial_seed())
    return {kind: write(tmp_path_factory.mktemp(kind) / "model") for kind, write in WRITERS.items()}


def pipeline_of(folder):
    from diffusers import DiffusionPipeline

    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if class_of(folder).startswith("Stable") else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **without_t5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def models(folders):
    """Parts, network and conditioning of each model."""
    built = {}
    for kind, folder in folders.items():
        parts = resolve_text(folder).parts
        conditioning, truncated = parts.encode(PROMPTS)
        assert truncated == []
        built[kind] = parts, parts.network(conditioning)
    return built


@pytest.mark.parametrize("kind", WRITERS)
def test_one_step_images_are_those_of_the_pipeline(folders, models, kind):
    parts, network = models[kind]
    assert conditioning_of(folders[kind]) == "prompts" and type(parts) in TRANSFORMERS.values()
    z, labels = latents_of(2), torch.tensor([1, 2])
    last = parts.schedule.num_train_timesteps - 1
    parts.check_one_step(last)
    with torch.no_grad():
        latents = OneStepGenerator(parts.schedule, last)(network, z, labels)
    pipeline = pipeline_of(folders[kind])
    if kind == "sana":
        # Its own sampler does not start from pure noise; a run saves Euler's.
        pipeline.scheduler = parts.scheduler_for(last, parts.prediction)
    size = latents.shape[-1] * parts.vae_scale_factor
    options = {"latents": z, "height": size, "width": size, **one_step_options(kind)}
    theirs = pipeline(PROMPTS[1:], **options, output_type="latent")[0]
    # The angle of SANA-Sprint's pipeline is rounded beyond pi / 2.
    assert torch.allclose(latents, theirs, atol=5e-5 if kind == "sana-sprint" else 1e-5)
    assert not torch.allclose(latents[0], latents[1], atol=1e-3)
    images = pipeline(PROMPTS[1:], **options, output_type="pt")[0]
    assert torch.allclose(parts.decode(latents) / 2 + 0.5, images, atol=1e-4)


@pytest.mark.parametrize("kind", WRITERS)
def test_guided_predictions_and_x0_in_float64(models, kind):
    parts, network = models[kind]
    z, t, labels = latents_of(3), torch.tensor([10, 500, 999]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        guided = predict(network, parts.schedule, z, t, labels, 4.5)
        x0 = parts.schedule.predict_x0(z, guided, t)
    sigma = parts.schedule.noise(t).double()
    double = TextConditioned(
        copy.deepcopy(network.unet).double(), network.table, parts.schedule, sample_size=z.shape[-1]
    )
    times = sigma.flatten() * (1 if kind == "sana-sprint" else 1000)
    with torch.no_grad():
        v = [double(z.double(), times, c)[0] for c in (torch.zeros_like(labels), labels)]
    expected = v[0] + 4.5 * (v[1] - v[0])
    assert (guided - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (x0 - (z - sigma * expected)).abs().max() <= 1e-4 * (1 + expected.abs().max())


def test_many_steps_are_those_of_the_pipeline(folders, models):
    """Euler's method over levels of the same spacing: the pipeline's own levels are shifted once more."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    parts, network = models["sd3"]
    z = latents_of(1)
    with torch.no_grad():
        ours = sample_ddim(network, parts.schedule, [2], 4, seed=5, guidance_scale=3.0)
    from pecker_fast.diffusion.sampling import _Noise

    z = _Noise(5, tuple(z.shape[1:])).start(1)
    sigmas = parts.schedule.noise(torch.tensor([999, 749, 499, 249]), 1).tolist()
    pipeline = pipeline_of(folders["sd3"])
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    size = z.shape[-1] * parts.vae_scale_factor
    options = {"sigmas": sigmas, "num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": ""}
    theirs = pipeline(PROMPTS[2], latents=z, height=size, width=size, **options, output_type="latent")[0]
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", WRITERS)
def test_saved_pipelines_are_read_by_diffusers(folders, models, kind, tmp_path):
    parts, network = models[kind]
    changed = network.like(copy.deepcopy(network.unet))
    with torch.no_grad():
        for param in changed.parameters():
            param.add_(0.02 * torch.randn(param.shape))
    save_text_pipeline(tmp_path / "run", changed.unet, parts, 999)
    assert class_of(tmp_path / "run") == class_of(folders[kind])
    z, labels = latents_of(1), torch.tensor([2])
    with torch.no_grad():
        latents = OneStepGenerator(parts.schedule, 999)(changed, z, labels)
    size = z.shape[-1] * parts.vae_scale_factor
    options = {"latents": z, "height": size, "width": size, **one_step_options(kind), "output_type": "latent"}
    assert torch.allclose(pipeline_of(tmp_path / "run")(PROMPTS[2], **options)[0], latents, atol=5e-5)
    again = resolve_text(tmp_path / "run").parts
    assert again.schedule.agrees(parts.schedule) or kind == "sana"
    assert again.schedule.noise(999).item() == 1.0


def test_what_does_not_fit_is_refused(folders, tmp_path):
    parts = resolve_text(folders["sd3"]).parts
    with pytest.raises(ValueError, match="t_init is 625, expected 999: Stable Diffusion 3 draws in one step from pure"):
        parts.check_one_step(625)
    with pytest.raises(ValueError, match="resolution is 7, expected a multiple of 2"):
        parts.latent_size(7)
    with pytest.raises(ValueError, match="needs the cross-attention of a U-Net"):
        parts.tokenize(["a dog"])
    broken = shutil.copytree(folders["sd3"], tmp_path / "broken")
    config = json.loads((broken / "transformer" / "config.json").read_text())
    (broken / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="_class_name 'FluxTransformer2DModel', expected one of SD3Transformer2DModel"):
        resolve_text(broken)
    index = json.loads((folders["sana"] / "model_index.json").read_text())
    other = shutil.copytree(folders["sana"], tmp_path / "other")
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "SanaVideoPipeline"}))
    with pytest.raises(ValueError, match="saved by a SanaVideoPipeline, expected one of SanaPipeline, SanaSprintPipe"):
        resolve_text(other)
    embeddings = torch.randn(3, 7, 16)
    with pytest.raises(ValueError, match=r"is told \{\} of each prompt beside embeddings, expected \{'encoder_att"):
        TextConditioned(sana_transformer(), PromptTable(embeddings), schedule_of("trigflow"))
    mask = {EMBEDDINGS: embeddings, "encoder_attention_mask": torch.ones(3, 7), "guidance": torch.ones(3)}
    network = TextConditioned(sana_transformer(), PromptTable(Conditioning(mask)), schedule_of("trigflow"))
    assert network.config == {"in_channels": 4, "sample_size": 16}
    with pytest.raises(ValueError, match="return one thing only"):
        network.like(network.unet, "epsilon")
