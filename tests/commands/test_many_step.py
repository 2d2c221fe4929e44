"""retrain, salun, selective_amnesia and esd on the command line."""

import json

import pytest
import torch

from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.models import load_network, save_network
from tests.commands.case import ASSETS, QUIET, fails, image_folder
from tests.diffusion.toy import tiny_unet

SMALL = ["--max_train_steps", "4", "--train_batch_size", "4", "--samples_per_class", "3", "--num_inference_steps", "3"]
OWN = {
    "retrain": [],
    "salun": ["--forget_batch_size", "3", "--saliency_batch_size", "80"],
    "selective_amnesia": ["--replay_images_per_class", "2", "--replay_steps", "2", "--fisher_samples", "3"],
    "esd": ["--trajectory_steps", "3"],
}
OWN["selective_amnesia"] += ["--fisher_timesteps", "5", "--fisher_chunks", "2"]


# Constants of each method's public code for CIFAR-10, and the differences for STL-10.
PUBLISHED = {
    "retrain": {"max_train_steps": 800_000, "train_batch_size": 128, "learning_rate": 2e-4, "ema_decay": 0.9999},
    "salun": {
        "max_train_steps": 1000, "train_batch_size": 128, "learning_rate": 1e-4, "ema_decay": None, "density": 0.5,
        "retain_weight": 1e-3, "saliency_guidance_scale": 3.0, "max_grad_norm": 1.0, "condition_dropout": 0.1,
    },
    "selective_amnesia": {
        "max_train_steps": 20_000, "train_batch_size": 128, "learning_rate": 1e-4, "ema_decay": 0.9999,
        "replay_weight": 1.0, "ewc_weight": 10.0, "replay_images_per_class": 500, "replay_guidance_scale": 3.0,
        "fisher_samples": None, "fisher_timesteps": 1000, "fisher_chunks": 20, "fisher_condition_dropout": 0.1,
    },
    "esd": {
        "max_train_steps": 1000, "train_batch_size": 1, "learning_rate": 1e-5, "trajectory_steps": 50,
        "trajectory_guidance_scale": 3.0, "negative_guidance": 7.5, "max_grad_norm": None, "empty_prompt": "null",
    },
}  # fmt: skip
STL10 = {"retrain": {"max_train_steps": 250_000}, "selective_amnesia": {"train_batch_size": 64}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_of_photographs_have_the_published_values(capsys, name):
    for preset, changed in (("cifar10", {}), ("stl10", STL10.get(name, {}))):
        main(["unlearn", "--preset", preset, "--method", name, "--dry_run"])
        options = json.loads(capsys.readouterr().out)["options"]
        assert {**options, **PUBLISHED[name], **changed} == options
        assert (options["eval_sampler"], options["num_inference_steps"], options["clip_sample"]) == (
            "ddpm",
            1000,
            False,
        )
        assert options["eval_guidance_scale"] == (1.0 if name == "retrain" else 3.0)


@pytest.mark.parametrize("name", OWN)
def test_run_records_its_sampler_and_is_sampled_by_it(capsys, tmp_path, name):
    folder = tmp_path / "run"
    main(["unlearn", "--method", name, "--output_dir", str(folder), *SMALL, *OWN[name], *QUIET])
    assert str(folder / "report.md") in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["method"], metrics["sampler"], metrics["sampling_steps"]) == (name, "ddim", 3)
    assert metrics["seconds_per_image"] > 0 and metrics["retain_accuracy"] >= 0
    phases = [json.loads(line)["phase"] for line in (folder / "train.jsonl").read_text().splitlines()]
    expected = {"salun": ["mask", "forget"], "selective_amnesia": ["replay", "fisher", "forget"]}
    assert list(dict.fromkeys(phases)) == expected.get(name, ["retrain" if name == "retrain" else "forget"])
    # The phases before training change no weights, so they are not evaluated.
    evaluations = [json.loads(line)["step"] for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert evaluations == [metrics["iterations"]]
    report = (folder / "report.md").read_text()
    assert "DDIM, 3 steps" in report and "| Sampler | ddim |" in report
    network, _ = load_network(folder / "unet")
    start, _ = load_network(ASSETS / "digits" / "unet")
    assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), start.parameters(), strict=True))
    # ESD-x trains the class embedding and the projections of the embedding in the blocks.
    sizes = {n: p.numel() for n, p in start.named_parameters()}
    trained = [n for n in sizes if name != "esd" or "class_embedding" in n or "time_emb_proj" in n]
    share = 100 * sum(sizes[n] for n in trained) / sum(sizes.values())
    assert metrics["parameters_trained"] == pytest.approx(share) and (share < 10) == (name == "esd")
    assert metrics["parameters_changed"] <= metrics["parameters_trained"]
    reached = {"salun": "keeps 50.0% of", "esd": f"the {share:.1f} % of the parameters that are trained"}
    assert reached.get(name, "reached every trained parameter") in report
    run = ["--pretrained-model-name-or-path", str(folder)]
    main(["sample", *run, "--labels", "1", "--output", str(tmp_path / "drawn.png")])
    assert "sampler ddim" in capsys.readouterr().out
    main(["evaluate", *run, "--samples-per-class", "2", "--no-progress-bar"])
    protocol = json.loads((folder / "evaluation.json").read_text())["protocol"]["samples"]
    assert (protocol["sampler"], protocol["num_inference_steps"], protocol["clip_sample"]) == ("ddim", 3, True)


def test_one_step_methods_record_their_sampler(tmp_path):
    folder = tmp_path / "run"
    options = [
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "3",
        "--forget_batch_size",
        "2",
        "--samples_per_class",
        "2",
    ]
    main(["unlearn", "--method", "sfd", "--output_dir", str(folder), *options, *QUIET])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["sampler"], metrics["sampling_steps"]) == ("one_step", 1) and metrics["seconds_per_image"] > 0


def test_one_table_of_both_kinds(capsys, tmp_path):
    folder = tmp_path / "c"
    main([
        "compare", "--methods", "salun,sfd", "--seeds", "1", "--output-dir", str(folder), "--max-train-steps", "2",
        "--samples-per-class", "3", "--no-progress-bar", "--set", "train_batch_size=3", "forget_batch_size=2",
        "num_inference_steps=2",
    ])  # fmt: skip
    assert "time / image" in capsys.readouterr().out
    lines = (folder / "report.md").read_text().splitlines()
    assert any(line.startswith("| salun | no | ddim |") for line in lines)
    assert any(line.startswith("| sfd | yes | one step |") for line in lines)
    assert any("steps / image" in line for line in lines)


REPLAY = ["--replay_images_per_class", "2", "--replay_steps", "2"]
GENERATED = ["--method", "salun", "--images", "generated", *REPLAY]
FISHER = ["--fisher_timesteps", "4", "--fisher_chunks", "1"]


def slow(*options: str):
    return pytest.param(options, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "salun", "--dataset_name", "DATA"],
        [*GENERATED, "--forget_data", "DATA"],
        slow(*GENERATED),
        slow("--method", "retrain", "--dataset_name", "DATA"),
        slow("--method", "selective_amnesia", *REPLAY, *FISHER),
        slow("--method", "esd", "--trajectory_steps", "2"),
    ],
    ids=["salun", "generated", "data-free", "retrain", "selective_amnesia", "esd"],
)
def test_data_free_salun_and_guidance_of_photographs(capsys, tmp_path, options):
    """A network with a label for "no condition", images from a folder, the published guidance."""
    data = image_folder(tmp_path / "data")
    network = tiny_unet(in_channels=3, sample_size=32, attention_resolutions=(), null_label=True)
    save_network(tmp_path / "net", network, NoiseSchedule.linear())
    common = [
        "unlearn",
        "--preset",
        "cifar10",
        "--pretrained_model_name_or_path",
        str(tmp_path / "net"),
        *SMALL,
        *QUIET,
    ]
    common += ["--forget_classes", "2", "--cover_class", "0"]
    places = {"--dataset_name": f"folder:{data}", "--forget_data": str(data)}
    options = [places.get(before, word) for before, word in zip(["", *options], options, strict=False)]
    out = tmp_path / "run"
    main([*common, *options, "--output_dir", str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["sampling_steps"] == 3 and metrics["sampler"] == "ddpm" and "ua" not in metrics
    assert metrics["guidance_scale"] == (1.0 if options[1] == "retrain" else 3.0)
    capsys.readouterr()


def test_wrong_inputs(capsys, tmp_path):
    out = ["--output_dir", str(tmp_path / "run")]
    small = [*SMALL, *QUIET]

    def refused(method: str, *options: str) -> str:
        return fails(capsys, "unlearn", "--method", method, *out, *small, *options)

    assert "eval_guidance_scale is 3" in refused("retrain", "--eval_guidance_scale", "3")
    assert "saliency_guidance_scale is 2" in refused("salun", "--saliency_guidance_scale", "2")
    assert "replay_guidance_scale is 2" in refused("selective_amnesia", "--replay_guidance_scale", "2")
    assert "empty_prompt" in refused("esd", "--empty_prompt", "null")
    assert "density is 0" in refused("salun", "--density", "0")
    assert "retain_weight is -1" in refused("salun", "--retain_weight", "-1")
    assert "num_inference_steps is 1001" in refused("esd", "--num_inference_steps", "1001")
    assert "fisher_timesteps is 0" in refused("selective_amnesia", "--fisher_timesteps", "0")
    assert "fisher_chunks is 9" in refused("selective_amnesia", "--fisher_chunks", "9", "--fisher_timesteps", "8")
    assert "fisher_samples is 21" in refused(
        "selective_amnesia", "--replay_images_per_class", "2", "--fisher_samples", "21"
    )
    assert "fisher_batch_size is 2" in refused("selective_amnesia", "--fisher_samples", "3", "--fisher_batch_size", "2")
    assert "trajectory_steps is 0" in refused("esd", "--trajectory_steps", "0")
    assert "max_grad_norm" in refused("salun", "--max_grad_norm", "0")
    digits = str(ASSETS / "digits" / "unet")
    assert "initial_generator is given" in refused("salun", "--initial_generator", digits)
    # Images of the wrong kind for the network, of too few classes, and none at all.
    data = image_folder(tmp_path / "data")
    assert "has the 3 classes class0, class1, class2, the pretrained network 10 classes: expected" in refused(
        "retrain", "--dataset_name", f"folder:{data}"
    )
    network = tiny_unet(in_channels=3, sample_size=32, attention_resolutions=(), null_label=True)
    save_network(tmp_path / "net", network, NoiseSchedule.linear())
    photographs = ["--preset", "cifar10", "--pretrained_model_name_or_path", str(tmp_path / "net")]
    assert "data_root is not given" in refused("salun", *photographs)
    assert "CIFAR-10 is not in" in refused("retrain", *photographs, "--data_root", str(tmp_path))
    assert not (tmp_path / "run").exists()
