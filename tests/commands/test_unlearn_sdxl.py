"""``pecker-fast unlearn`` on a small Stable Diffusion XL, from the command line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pecker_fast.cli import main
from pecker_fast.diffusion import OneStepGenerator
from pecker_fast.models import KNOWN, Prediction, read_stable_diffusion, resolve_text
from pecker_fast.models.stable_diffusion_xl import StableDiffusionXL
from pecker_fast.runs.patches import inspect_patch
from pecker_fast.runs.presets import PRESETS, method_options
from pecker_fast.unlearning import method_class
from tests.commands.case import fails
from tests.diffusion.tiny_sdxl import LATENTS, SIZE, tiny_xl_unet, turbo_scheduler, write_sdxl
from tests.inputs import same_bits

SMALL = ["--max_train_steps", "2", "--no-progress_bar", "--device", "cpu", "--gradient_accumulation_steps", "2"]
SMALL += ["--checkpointing_steps", "1", "--validation_steps", "2", "--logging_steps", "1", "--sample_steps", "2"]
SMALL += ["--samples_per_prompt", "1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(torch.initial_seed())
    write_sdxl(folder / "base")
    write_sdxl(folder / "sdxl-turbo", turbo_scheduler())
    state = {name: value.half() for name, value in tiny_xl_unet().state_dict().items()}
    save_file(state, folder / "sdxl_lightning_1step_unet_x0.safetensors")
    torch.save(state, folder / "dmd2_sdxl_1step_unet_fp16.bin")
    (folder / "retain.txt").write_text("a dog\na cat\na tree\n")
    (folder / "samples.txt").write_text("a hat\nBrad Pitt smiles\n")
    (folder / "forget.txt").write_text("a photo of {concept}\n{concept} smiles\n")
    return folder


def command(place, run, *more: str, preset: str = "sdxl-celebrity", method: str = "sfd") -> list[str]:
    words = ["unlearn", "--preset", preset, "--method", method, "--output_dir", str(run), *SMALL]
    words += ["--pretrained_model_name_or_path", str(place / "base"), "--retain_prompts", str(place / "retain.txt")]
    words += ["--sample_prompts", str(place / "samples.txt")]
    return [*words, "--forget_prompts", str(place / "forget.txt"), "--concept", "Brad Pitt", "--cover", "a man", *more]


GENERATORS = {
    "sfd": ("sdxl-turbo", 999, Prediction()),
    "pecker": ("sdxl_lightning_1step_unet_x0.safetensors", 999, Prediction("sample")),
    "patch": ("dmd2_sdxl_1step_unet_fp16.bin", 399, Prediction(unit_noise=True)),
}


@pytest.fixture(scope="module")
def runs(place):
    for method, (name, *_) in GENERATORS.items():
        more = ["--initial_generator", str(place / name)]
        few = {"pecker": ["--saliency_batches", "2"], "patch": ["--density", "0.1", "--saliency_chunks", "2"]}
        more += few.get(method, [])
        main(command(place, place / method, *more, method=method))
    return place


@pytest.mark.parametrize("method", GENERATORS)
def test_runs_start_from_published_generators(runs, method):
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

    name, t_init, prediction = GENERATORS[method]
    run = runs / method
    config, metrics = (json.loads((run / f"{file}.json").read_text()) for file in ("config", "metrics"))
    assert config["options"]["t_init"] == t_init and metrics["sampler"] == "one_step" and metrics["iterations"] == 2
    assert config["known_generator"] in map(str, KNOWN.values()) and "licence" in config["known_generator"]
    log = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(
        torch.tensor([v for k, v in line.items() if "loss" in k]).isfinite().all() for line in log
    )
    for picture in ("before", "after", "before_after", "step-000002"):
        assert (run / "samples" / f"{picture}.png").is_file(), picture
    model = resolve_text(run)
    assert model.t_init == t_init and model.prediction == prediction
    # The run's own network, its pipeline and diffusers' draw the same latents.
    z = torch.randn(1, LATENTS, SIZE, SIZE)
    network = model.parts.network(model.parts.encode(["", "a dog"])[0], unet=model.load_unet())
    with torch.no_grad():
        ours = OneStepGenerator(model.parts.schedule, t_init)(network, z, torch.tensor([1]))
    pipe = DiffusionPipeline.from_pretrained(run, custom_pipeline=str(run), trust_remote_code=True)
    assert torch.allclose(pipe("a dog", latents=z, output_type="latent").images, ours, rtol=1e-3, atol=1e-3)
    plain = StableDiffusionXLPipeline.from_pretrained(run, add_watermarker=False)
    steps = {"timesteps": [399]} if prediction.unit_noise else {}
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "latents": z, "output_type": "latent", **steps}
    assert torch.allclose(plain("a dog", **options).images, ours, rtol=1e-3, atol=1e-3)
    if method == "patch":
        before = {name: value.float() for name, value in torch.load(runs / name).items()}
        after = model.load_unet().state_dict()
        changed = sum((after[key] != value).sum().item() for key, value in before.items())
        # The patch of a run refers to the weights in the file, whatever their format.
        main(["patch", "make", str(run), "--output", str(runs / "forget.safetensors")])
        assert inspect_patch(runs / "forget.safetensors").count == changed
        assert 0 < changed <= 0.1 * sum(value.numel() for value in before.values()) + 1


def test_prompts_are_encoded_once_with_both_embeddings(runs, monkeypatch):
    stored = load_file(runs / "sfd" / "prompts.safetensors")
    assert set(stored) == {"embeddings", "added_cond_kwargs.text_embeds"}
    folder = runs / "again"
    shutil.copytree(runs / "sfd", folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-2")
    shutil.rmtree(folder / "unet")
    monkeypatch.setattr(StableDiffusionXL, "encode", lambda *_: pytest.fail("prompts were encoded again"))
    main(command(runs, folder, "--initial_generator", str(runs / "sdxl-turbo"), "--resume_from_checkpoint", "latest"))
    one, two = (list(read_stable_diffusion(place).load_unet().parameters()) for place in (runs / "sfd", folder))
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True))


def test_a_run_continues_another_ones_generator(runs):
    """How it draws is read from the folder, not from a name."""
    main(command(runs, runs / "second", "--initial_generator", str(runs / "pecker"), "--max_train_steps", "1"))
    config = json.loads((runs / "second" / "config.json").read_text())
    assert config["options"]["t_init"] == 999 and resolve_text(runs / "second").prediction == Prediction("sample")


def test_nudity_in_low_precision_with_an_adapter(place):
    pytest.importorskip("peft")
    run = place / "nudity"
    words = ["unlearn", "--preset", "sdxl-nudity", "--method", "pecker", "--output_dir", str(run), *SMALL]
    words += ["--pretrained_model_name_or_path", str(place / "base"), "--retain_prompts", str(place / "retain.txt")]
    words += ["--sample_prompts", str(place / "samples.txt"), "--gradient_accumulation_steps", "1"]
    words += ["--weights_dtype", "bfloat16", "--score_lora_rank", "2", "--resolution", "32", "--saliency_batches", "2"]
    main([*words, "--max_train_steps", "1"])
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["negative_roles"] == [True, True, True] and config["options"]["t_init"] == 625
    assert (
        "known_generator" not in config and load_file(run / "prompts.safetensors")["embeddings"].dtype == torch.bfloat16
    )
    assert resolve_text(run).prediction == Prediction()


def test_evaluation_of_a_run_and_of_a_file(runs, tmp_path):
    (tmp_path / "eval.txt").write_text("a hat\n")
    options = ["--task", "nudity", "--no-nudenet", "--prompts", str(tmp_path / "eval.txt"), "--images-per-prompt", "1"]
    options += ["--near", str(tmp_path / "eval.txt"), "--near-images-per-prompt", "1", "--no-progress-bar"]
    main(["evaluate-concept", str(runs / "pecker"), *options])
    protocol = json.loads((runs / "pecker" / "metrics.json").read_text())["protocol"]["concept"]
    assert protocol["samples"]["sampler"] == "one_step" and protocol["samples"]["t_init"] == 999
    light = runs / "sdxl_lightning_1step_unet_x0.safetensors"
    main(["evaluate-concept", str(light), "--base", str(runs / "base"), "--output", str(tmp_path / "e.json"), *options])
    samples = json.loads((tmp_path / "e.json").read_text())["protocol"]["samples"]
    assert samples["t_init"] == 999 and samples["prediction"]["prediction_type"] == "sample"


def test_dry_run_estimates_memory(place, capsys):
    start = ["--initial_generator", str(place / "sdxl-turbo"), "--gradient_accumulation_steps", "1"]
    main(command(place, place / "none", *start, "--dry_run"))
    output = capsys.readouterr().out
    assert "most at a time" in output and '"t_init": 999' in output and not (place / "none").exists()


def test_wrong_generators(place, capsys, tmp_path):
    words = command(place, tmp_path / "run", "--initial_generator", str(place / "sdxl-turbo"))
    assert "draws in one step at 999: leave t_init out" in fails(capsys, *words, "--t_init", "500")
    many = shutil.copy(place / "dmd2_sdxl_1step_unet_fp16.bin", tmp_path / "dmd2_sdxl_4step_unet_fp16.bin")
    line = fails(capsys, *command(place, tmp_path / "run", "--initial_generator", str(many)))
    assert "is made for several steps" in line
    line = fails(capsys, *command(place, tmp_path / "run", "--generator_kind", "dmd2"))
    assert "generator_kind is 'dmd2', but initial_generator is not given" in line
    assert not (tmp_path / "run").exists()
    # As the model itself predicts, if asked for.
    main([*words, "--t_init", "500", "--generator_kind", "plain", "--max_train_steps", "1"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["t_init"] == 500


def test_presets():
    for task in ("celebrity", "nudity"):
        one, two = PRESETS[f"sd15-{task}"], PRESETS[f"sdxl-{task}"]
        assert two.xl and not one.xl and (one.subject, one.concept, one.cover) == (two.subject, two.concept, two.cover)
        for method in ("pecker", "sfd", "patch"):
            a, b = (method_options(name, method_class(method)) for name in (f"sd15-{task}", f"sdxl-{task}"))
            sizes = [o.train_batch_size * o.gradient_accumulation_steps for o in (a, b)]
            assert sizes == [8, 8] and b.train_batch_size == 1 and a.negative_roles == b.negative_roles
