"""pecker-fast fisher, its file, and Selective Amnesia on a small Stable Diffusion from the command line."""

import json
import shutil

import pytest
import safetensors
import safetensors.torch
import torch

from pecker_fast.cli import main
from pecker_fast.hashing import weights_hash
from pecker_fast.models import StableDiffusion
from pecker_fast.runs.fisher_file import FisherFacts, load_fisher, save_fisher
from pecker_fast.runs.presets import method_options, method_values
from pecker_fast.runs.prompts.request import MemoryArguments
from pecker_fast.unlearning import method_class
from tests.commands.case import fails
from tests.diffusion.tiny_sd import write_stable_diffusion

SMALL = [
    "--device",
    "cpu",
    "--no-progress_bar",
    "--replay_images",
    "4",
    "--replay_steps",
    "2",
    "--replay_batch_size",
    "3",
]
SMALL += ["--fisher_timesteps", "4", "--fisher_chunks", "2", "--logging_steps", "1"]
FORGET = ["--max_train_steps", "3", "--train_batch_size", "2", "--surrogate_images", "3", "--num_inference_steps", "2"]
FORGET += ["--sample_steps", "2", "--samples_per_prompt", "1", "--checkpointing_steps", "2", "--learning_rate", "1e-3"]
FORGET += ["--checkpoints_total_limit", "9"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and the Fisher information that the command makes of it."""
    folder = tmp_path_factory.mktemp("fisher")
    write_stable_diffusion(folder / "base")
    (folder / "retain.txt").write_text("a dog\na cat\na tree\n")
    main(["fisher", *words(folder, "sd15-celebrity"), "--output_dir", str(folder / "fisher")])
    return folder


def words(place, preset: str) -> list[str]:
    base = ["--preset", preset, "--pretrained_model_name_or_path", str(place / "base")]
    return [*base, "--retain_prompts", str(place / "retain.txt"), *SMALL]


def unlearn(place, output, *more: str, preset: str = "sd15-celebrity", fisher=None) -> list[str]:
    fisher = place / "fisher" / "fisher.safetensors" if fisher is None else fisher
    command = ["unlearn", *words(place, preset), "--method", "selective_amnesia", "--fisher", str(fisher), *FORGET]
    return [*command, "--output_dir", str(output), *more]


def test_fisher_file(place):
    path = place / "fisher" / "fisher.safetensors"
    unet = StableDiffusion(place / "base").load_unet()
    result = load_fisher(path, unet, weights_hash(unet), "mean")
    assert result.keys() == {name for name, _ in unet.named_parameters()}
    # Timesteps left out of the sum do not leave entries at zero.
    assert all(float(value.max()) > 0 for name, value in result.items() if not name.endswith("to_k.bias"))
    with safetensors.safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["fisher"])
    assert (metadata["format"], metadata["version"], metadata["samples"], metadata["timesteps"]) == (
        "pecker_fast.fisher",
        1,
        4,
        4,
    )
    log = [json.loads(line) for line in (place / "fisher" / "train.jsonl").read_text().splitlines()]
    # Four images in batches of three, then each by itself.
    assert [line["phase"] for line in log] == ["replay"] * 2 + ["fisher"] * 4
    # Checkpoints of phases without training have no network.
    (checkpoint,) = (place / "fisher" / "checkpoints").iterdir()
    assert not (checkpoint / "unet").exists()


def test_resumed_fisher_file_has_the_same_bytes(place, tmp_path):
    again = tmp_path / "fisher"
    arguments = ["fisher", *words(place, "sd15-celebrity"), "--checkpointing_steps", "4", "--output_dir", str(again)]
    main(arguments)
    file = (again / "fisher.safetensors").read_bytes()
    assert file == (place / "fisher" / "fisher.safetensors").read_bytes()
    shutil.rmtree(again / "checkpoints" / "checkpoint-6")
    (again / "fisher.safetensors").unlink()
    main([*arguments, "--resume_from_checkpoint", "latest"])
    assert (again / "fisher.safetensors").read_bytes() == file


def test_run_and_resume(place, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    run, again = tmp_path / "run", tmp_path / "again"
    main(unlearn(place, run, preset="sd15-nudity"))
    config, metrics = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "metrics"))
    published = {"replay_weight": 1.0, "ewc_weight": 50.0, "loss_reduction": "mean", "trained": "u"}
    assert published.items() <= config["options"].items() and config["teacher_dtype"] == "float32"
    assert len(config["fisher_sha256"]) == 64 and metrics["sampler"] == "ddim"
    log = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in log] == ["replay"] * 3 + ["forget"] * 3
    # At first the weights equal those that the penalty refers to.
    assert log[3]["loss_ewc"] == 0 and log[5]["loss_ewc"] > 0
    drift = json.loads((run / "drift.json").read_text())["layers"]
    outside = ("time_embedding", "conv_norm_out", "conv_out")
    for name, entry in drift.items():
        assert (entry["changed"] == 0) == (".attn2." in name or name.startswith(outside)), name
    report = (run / "report.md").read_text()
    assert "forget nudity" in report and "No mask" in report
    StableDiffusionPipeline.from_pretrained(run, safety_checker=None)
    # Resumed from within the last phase, and from within the first.
    for step in (4, 2):
        shutil.copytree(run, again)
        for checkpoint in list((again / "checkpoints").iterdir()):
            if checkpoint.name != f"checkpoint-{step}":
                shutil.rmtree(checkpoint)
        shutil.rmtree(again / "unet")
        main(unlearn(place, again, "--resume_from_checkpoint", "latest", preset="sd15-nudity"))
        files = [folder / "unet" / "diffusion_pytorch_model.safetensors" for folder in (run, again)]
        assert files[0].read_bytes() == files[1].read_bytes()
        # Another Fisher file makes it another run.
        other = tmp_path / f"other-{step}.safetensors"
        changed(place, other, lambda values: {name: 2 * value for name, value in values.items()})
        more = ["--resume_from_checkpoint", "latest"]
        capsys.readouterr()
        error = fails(capsys, *unlearn(place, again, *more, preset="sd15-nudity", fisher=other))
        assert "fisher_sha256 is" in error and "of another run" in error
        shutil.rmtree(again)


def changed(place, path, change=lambda found: found, **facts) -> None:
    """A Fisher file like the model's, with some changes."""
    unet = StableDiffusion(place / "base").load_unet()
    values = {name: torch.rand(param.shape) for name, param in unet.named_parameters()}
    metadata = {
        "pretrained_sha256": weights_hash(unet),
        "loss_reduction": "mean",
        "samples": 4,
        "timesteps": 4,
        **facts,
    }
    save_fisher(path, change(values), FisherFacts(**metadata))


def without_one(values):
    return {name: value for name, value in values.items() if name != "conv_in.weight"}


@pytest.mark.parametrize(
    ("change", "facts", "message"),
    [
        (without_one, {}, "lacks the parameter conv_in.weight"),
        (
            lambda values: {**values, "conv_in.bias": torch.rand(3)},
            {},
            r"conv_in.bias is torch.float32 \(3,\), expected",
        ),
        (lambda values: {**values, "conv_in.bias": torch.rand(8).double()}, {}, "conv_in.bias is torch.float64"),
        (lambda values: {**values, "conv_in.bias": torch.full((8,), torch.nan)}, {}, "negative, inf or NaN"),
        (lambda values: {**values, "conv_in.bias": -torch.ones(8)}, {}, "negative, inf or NaN"),
        (lambda values: values, {"pretrained_sha256": "0" * 64}, "of other weights"),
        (lambda values: values, {"loss_reduction": "sum"}, "give the same --loss_reduction, or make it"),
    ],
)
def test_wrong_files(place, tmp_path, change, facts, message):
    unet, path = StableDiffusion(place / "base").load_unet(), tmp_path / "fisher.safetensors"
    changed(place, path, change, **facts)
    with pytest.raises(ValueError, match=message) as caught:
        load_fisher(path, unet, weights_hash(unet), "mean")
    assert str(caught.value).startswith(f"fisher is {str(path)!r}") and "pecker-fast fisher" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_inputs_end_with_one_line_and_write_nothing(place, tmp_path, capsys):
    output, path = tmp_path / "run", tmp_path / "some.safetensors"
    assert "there is no such file: make it with" in fails(capsys, *unlearn(place, output, fisher=path))
    safetensors.torch.save_file({"a": torch.rand(3)}, path)
    assert "holds no Fisher information" in fails(capsys, *unlearn(place, output, fisher=path))
    whole = (place / "fisher" / "fisher.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "which is damaged" in fails(capsys, *unlearn(place, output, fisher=path))
    changed(place, path, without_one)
    assert "lacks the parameter" in fails(capsys, *unlearn(place, output, fisher=path))
    arguments = unlearn(place, output)
    arguments[arguments.index("--fisher") : arguments.index("--fisher") + 2] = []
    assert "fisher is not given" in fails(capsys, *arguments)
    arguments = ["unlearn", *words(place, "sd15-celebrity")[:6], "--method", "esd", "--output_dir", str(output)]
    assert "esd takes none" in fails(capsys, *arguments, "--fisher", str(path))
    making = ["fisher", *words(place, "sd15-celebrity"), "--output_dir", str(output)]
    assert "trained is 'u'" in fails(capsys, *making, "--trained", "u")
    assert "this command makes the file" in fails(capsys, *making, "--fisher", str(path))
    assert "fisher_chunks is 9" in fails(capsys, *making, "--fisher_chunks", "9")
    assert not output.exists()


def test_published_constants():
    for preset, steps, trained in (("sd15-celebrity", 200 * 1000 // 16, "all"), ("sd15-nudity", 500 * 1000 // 16, "u")):
        kind = method_class("selective_amnesia")
        options = method_options(preset, kind)
        assert (options.max_train_steps, options.trained, options.train_batch_size) == (steps, trained, 16)
        assert (options.replay_weight, options.ewc_weight, options.learning_rate) == (1.0, 50.0, 1e-5)
        assert (options.surrogate_images, options.replay_images, options.fisher_samples) == (1000, 5000, None)
        assert (options.replay_sampler, options.replay_steps, options.replay_guidance_scale) == ("ddim", 50, 7.5)
        assert method_values(preset, kind, MemoryArguments) == {"teacher_dtype": "float32"}
