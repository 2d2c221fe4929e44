"""Forgetting a concept of a transformer with flow matching, from its folder to a folder that diffusers reads."""

import json

import pytest
import torch

import pecker_fast as pf
from pecker_fast.models import resolve_text
from pecker_fast.runs.prompts.task import PromptTask, memory_of
from pecker_fast.runs.task import unlearn_arguments
from tests.models.test_transformers import pipeline_of
from tests.models.tiny_transformers import WRITERS, class_of, latents_of, one_step_options

OPTIONS = {
    "max_train_steps": 2,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "score_learning_rate": 1e-3,
    "generator_learning_rate": 1e-3,
    "samples_per_prompt": 1,
    "progress_bar": False,
}
SMALL = {
    "patch": {"saliency_chunks": 2, "saliency_chunk_size": 1, "density": 0.2},
    "pecker": {"saliency_batch_size": 1, "saliency_batches": 1},
    "sfd": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(torch.initial_seed())
    return {kind: WRITERS[kind](tmp_path_factory.mktemp(kind) / "model") for kind in ("sd3", "sana-sprint")}


def run(kind, folders, output, method, **options):
    lists = folders[kind].parent
    files = {"retain": "a dog\na cat\n", "forget": "{concept} smiles\n"}
    for name, content in files.items():
        (lists / f"{name}.txt").write_text(content)
    prompts = {f"{name}_prompts": str(lists / f"{name}.txt") for name in files}
    values = {**OPTIONS, **prompts, **SMALL.get(method, {}), "output_dir": str(output), **options}
    values = {name: value for name, value in values.items() if value is not None}
    names = {"forget": "brad pitt", "cover": "a middle aged man", "preset": f"{kind}-celebrity"}
    return pf.unlearn(str(folders[kind]), method, **names, **values)


@pytest.mark.parametrize(("kind", "method"), [("sd3", "pecker"), ("sana-sprint", "patch")])
def test_a_concept_is_forgotten(folders, tmp_path, kind, method):
    run(kind, folders, tmp_path / "run", method)
    assert class_of(tmp_path / "run") == class_of(folders[kind])
    parts = resolve_text(tmp_path / "run")
    assert parts.t_init == 999
    conditioning, _ = parts.parts.encode(["", "brad pitt smiles"])
    network = parts.parts.network(conditioning)
    z = latents_of(1)
    sampler_latents = draw(network, parts.parts.schedule, z)
    size = z.shape[-1] * parts.parts.vae_scale_factor
    options = {"latents": z, "height": size, "width": size, **one_step_options(kind), "output_type": "latent"}
    theirs = pipeline_of(tmp_path / "run")("brad pitt smiles", **options)[0]
    assert torch.allclose(theirs, sampler_latents, atol=1e-4)
    before = pipeline_of(folders[kind])("brad pitt smiles", **options)[0]
    assert not torch.allclose(before, theirs, atol=1e-3)
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["t_init"] == 999


def draw(network, schedule, z):
    from pecker_fast.diffusion import OneStepGenerator

    with torch.no_grad():
        return OneStepGenerator(schedule, 999)(network, z, torch.tensor([1]))


@pytest.mark.parametrize(
    ("kind", "method", "options", "message"),
    [
        ("sd3", "sfd", {"t_init": 625}, "t_init is 625, expected 999: Stable Diffusion 3 draws in one step from pure"),
        ("sd3", "relabel", {}, "needs the cross-attention of a U-Net"),
        ("sana-sprint", "esd", {}, "trains a diffusion model, but the pretrained network draws in one step"),
        ("sana-sprint", "sfd", {"teacher_guidance_scale": 4.5, "resolution": 31}, "resolution is 31"),
    ],
)
def test_what_does_not_fit_is_refused(folders, tmp_path, kind, method, options, message):
    own = {} if method == "sfd" else dict.fromkeys(OPTIONS.keys() - {"progress_bar", "samples_per_prompt"})
    with pytest.raises(ValueError, match=message) as error:
        run(kind, folders, tmp_path / "run", method, **own, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "unet").exists()


@pytest.mark.parametrize("kind", ["sd3", "sana-sprint"])
def test_memory_is_estimated(folders, kind):
    values = {"pretrained_model_name_or_path": str(folders[kind]), **SMALL["patch"]}
    args = unlearn_arguments(f"{kind}-celebrity", "patch", values)
    estimate = memory_of(args)
    count = sum(p.numel() for p in resolve_text(folders[kind]).load_unet().parameters())
    assert estimate.parameters == count and estimate.peak > estimate.weights >= 3 * 4 * count
    assert "estimated for the folder of a model" in PromptTask.estimate(unlearn_arguments(f"{kind}-celebrity", "sfd"))
