"""unlearn, pretrain, sample, mask and demo on the command line."""

import hashlib
import importlib.metadata
import json
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import pecker_fast
from pecker_fast.cli import COMMANDS, main
from pecker_fast.commands.unlearn import BASIC
from pecker_fast.diffusion import NoiseSchedule, Sampler
from pecker_fast.diffusion.pipeline import OneStepPipeline
from pecker_fast.mask import SaliencyMask
from pecker_fast.models import load_network, save_network, save_one_step_pipeline
from pecker_fast.records import read_lines
from pecker_fast.report import cautions
from pecker_fast.runs import pretrain as pretraining
from pecker_fast.runs.arguments import option_groups
from pecker_fast.runs.classes import task
from pecker_fast.runs.task import unlearn_arguments
from pecker_fast.unlearning import method_class, method_names
from tests import processes
from tests.commands.case import ASSETS, QUIET, SMALL, fails, image_folder
from tests.diffusion.toy import tiny_unet
from tests.models.ancestor_model import AncestorUNet
from tests.report.test_render import check_page


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


METHODS = [("digits", name) for name in method_names()]
METHODS += [("sd15-nudity", name) for name in method_names() if method_class(name).forgets_prompts]


@pytest.mark.parametrize(("preset", "method"), METHODS)
def test_help_names_every_option(capsys, monkeypatch, preset, method):
    """Two screens by default; --help_all has every option, including those of the method."""
    monkeypatch.setenv("COLUMNS", "80")
    command = ["unlearn", "--preset", preset, "--method", method]
    short, full = help_of(capsys, *command, "--help"), help_of(capsys, *command, "--help_all")
    assert len(short.splitlines()) <= 100 and "--help_all" in short
    options = option_groups(unlearn_arguments(preset, method))
    # relabel trains nothing.
    assert ("max_train_steps" in options) == (method != "relabel") and "checkpoints_total_limit" in options
    for name in options:
        assert re.search(rf"--{name}\b", full), name
        assert re.search(rf"--{name}\b", short) is not None or name not in BASIC
    assert "checkpoints_total_limit" not in short
    assert ("--density" in full) == ("--density" in short) == ("density" in options)


def test_help_of_all_commands(capsys):
    overview = help_of(capsys, "--help")
    for name in COMMANDS:
        assert f"  {name} " in overview
        assert f"usage: pecker-fast {name}" in help_of(capsys, name, "--help")
    main(["--version"])
    assert capsys.readouterr().out == f"pecker-fast {pecker_fast.__version__}\n"


def test_dry_run_prints_the_published_values_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(
        [
            "unlearn",
            "--preset",
            "stl10",
            "--method",
            "pecker+",
            "--dry_run",
            "--density",
            "0.2",
            "--cover_class",
            "random",
        ]
    )
    config = json.loads(capsys.readouterr().out)
    options = config["options"]
    assert (options["train_batch_size"], options["score_learning_rate"], options["generator_learning_rate"]) == (
        64,
        3e-5,
        1e-5,
    )
    assert (options["t_init"], options["t_min"], options["t_max"], options["alpha"]) == (440, 38, 711, 1.2)
    assert (options["density"], options["variance"], options["max_update"]) == (0.2, "retain", 4.0)
    assert config["cover_class"] is None and config["method"] == "pecker+" and config["forget_classes"] == [0]
    main(["pretrain", "--preset", "cifar10", "--dry_run"])
    config = json.loads(capsys.readouterr().out)
    assert config["options"]["max_train_steps"] == 800_000 and config["unet"]["block_out_channels"] == [
        128,
        256,
        256,
        256,
    ]
    assert list(tmp_path.iterdir()) == []


def check_audit(folder: Path, network) -> None:
    """The run's statements about its weights, its mask and its files are true."""
    metrics = json.loads((folder / "metrics.json").read_text())
    start, _ = load_network(ASSETS / "digits" / "unet")
    a, b = (torch.cat([p.detach().double().flatten() for p in net.parameters()]) for net in (start, network))
    assert 0 < metrics["drift_norm"] == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-9)
    assert metrics["parameters_trained"] == 100
    assert metrics["parameters_changed"] == pytest.approx(100 * (a != b).double().mean().item(), rel=1e-9)
    drift, mask = json.loads((folder / "drift.json").read_text()), SaliencyMask.load(folder / "mask.safetensors")
    assert [*mask.names] == [name for name, _ in network.named_parameters()]
    parameters = dict(network.named_parameters())
    for layer, entry in drift["layers"].items():
        names = [name for name in parameters if name.rpartition(".")[0] == layer]
        salient = sum(int(mask[name].sum()) for name in names)
        count = sum(parameters[name].numel() for name in names)
        assert entry["parameters"] == count and entry["salient"] == pytest.approx(salient / count, rel=1e-9), layer
    assert sum(entry["parameters"] for entry in drift["modules"].values()) == len(a) == drift["total"]["parameters"]
    hashes = json.loads((folder / "hashes.json").read_text())
    assert {"config.json", "metrics.json", "mask.safetensors", "unet/diffusion_pytorch_model.safetensors"} <= {*hashes}
    for name, entry in hashes.items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest(), name
    events = read_lines(folder / "history.jsonl")
    assert events[0]["event"] == "started" and events[0]["step"] == 0
    assert (events[-1]["event"], events[-1]["step"]) == ("ended", metrics["iterations"])
    assert events[0]["command"][:4] == ["pecker-fast", "unlearn", "--preset", "digits"]
    protocol = metrics["protocol"]
    assert protocol["samples"]["seed"] == 0 and protocol["packages"]["torch"] == importlib.metadata.version("torch")
    page = check_page((folder / "report.html").read_text())
    assert events[0]["date"][:10] in page.text and "Is it forgotten?" in page.text
    # The report is written after the profile and contains it.
    assert "seconds_by_region.optimizer" in page.text and hashes["config.json"]["sha256"] in page.text
    assert "license: other" in (folder / "README.md").read_text()


def test_report_is_rewritten(capsys, tmp_path):
    folder = tmp_path / "run"
    main(["unlearn", "--method", "sfd", "--output_dir", str(folder), *SMALL, *QUIET])
    assert not (folder / "mask.safetensors").exists()
    (folder / "robustness.json").write_text(json.dumps({"probe": {"rows": [{"step": 7, "share": 0.125}]}}))
    (folder / "report.html").unlink()
    main(["report", str(folder)])
    output = capsys.readouterr().out
    assert "changed since" not in output and str(folder / "report.html") in output
    assert "0.125" in check_page((folder / "report.html").read_text()).text
    with open(folder / "train.jsonl", "a") as file:
        file.write("\n")
    (folder / "pipeline.py").unlink()
    main(["report", str(folder)])
    assert "changed since the run ended: train.jsonl, pipeline.py" in capsys.readouterr().out
    assert (folder / "report.md").read_text().count("| CHANGED |") == 2
    assert "no such folder" in fails(capsys, "report", str(tmp_path / "nowhere"))
    assert "metrics.json" in fails(capsys, "report", str(tmp_path))
    # A new run there removes the old one.
    main(["unlearn", "--method", "sfd", "--output_dir", str(folder), *SMALL, *QUIET, "--overwrite_output_dir"])
    assert not (folder / "robustness.json").exists() and (folder / "report.html").is_file()


def test_run_folder_and_samples_of_its_network(capsys, tmp_path):
    folder = tmp_path / "run"
    main(["unlearn", "--output_dir", str(folder), "--forget_classes", "0", "3", *SMALL, *QUIET, "--profile"])
    output = capsys.readouterr().out
    assert "optimizer" in output and str(folder / "report.md") in output
    # What makes figures doubtful is printed, too: every caution of the report.
    printed = [line.removeprefix("caution: ") for line in output.splitlines() if line.startswith("caution: ")]
    assert printed == cautions(json.loads((folder / "metrics.json").read_text()))
    assert any("rests on 6 images" in line for line in printed)
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("ua", "retain_accuracy", "frechet_distance", "diversity", "seconds", "peak_memory_bytes"):
        assert metrics[name] >= 0, name
    assert metrics["iterations"] == 4 and metrics["images"] == 12 and metrics["method"] == "pecker"
    for name in (
        "config.json",
        "train.jsonl",
        "evaluation.jsonl",
        "report.md",
        "report.png",
        "samples/before_after.png",
    ):
        assert (folder / name).stat().st_size > 0, name
    network, schedule = load_network(folder / "unet")
    assert schedule.num_train_timesteps == 1000
    check_audit(folder, network)
    start, _ = load_network(ASSETS / "digits" / "unet")
    assert any(not torch.equal(a, b) for a, b in zip(network.parameters(), start.parameters(), strict=True))
    pipe = OneStepPipeline.from_pretrained(folder)
    assert pipe.config.t_init == 250 and len(pipe([0, 1], num_images_per_label=2).images) == 4
    assert torch.equal(pipe.unet.conv_in.weight, network.conv_in.weight)
    picture = tmp_path / "drawn.png"
    main(["sample", "--pretrained-model-name-or-path", str(folder), "--labels", "1", "--output", str(picture)])
    assert "one_step" in capsys.readouterr().out and picture.stat().st_size > 0
    # A second run there is refused, and the first one is intact.
    assert "--overwrite_output_dir" in fails(capsys, "unlearn", "--output_dir", str(folder), *SMALL)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    error = fails(
        capsys, "unlearn", "--output_dir", str(folder), "--forget_classes", "0", "3", *SMALL, "--density", "0.1",
        "--resume_from_checkpoint", "latest",
    )  # fmt: skip
    assert "options.density is 0.5 there and 0.1 here" in error


def test_unlearning_from_a_pretrain_run(capsys, tmp_path):
    small = [
        "--max_train_steps",
        "3",
        "--train_batch_size",
        "4",
        "--block_out_channels",
        "8",
        "16",
        "--samples_per_class",
        "2",
    ]
    main(["pretrain", "--output_dir", str(tmp_path / "p"), *small, *QUIET])
    assert json.loads((tmp_path / "p" / "metrics.json").read_text())["iterations"] == 3
    main([
        "unlearn", "--pretrained_model_name_or_path", str(tmp_path / "p"), "--output_dir", str(tmp_path / "u"),
        "--method", "sfd", *SMALL, *QUIET, "--no-evaluate",
    ])  # fmt: skip
    metrics = json.loads((tmp_path / "u" / "metrics.json").read_text())
    assert metrics["iterations"] == 4 and "ua" not in metrics
    capsys.readouterr()


def test_mask_is_computed_saved_and_shown(capsys, tmp_path):
    path = tmp_path / "m.safetensors"
    main(["mask", "--density", "0.1", "--output", str(path)])
    computed = capsys.readouterr().out
    main(["mask", "--inspect", str(path)])
    shown = capsys.readouterr().out
    assert "conv_in" in shown and shown.strip() in computed
    assert "density" in fails(capsys, "mask", "--density", "0")
    assert "nowhere" in fails(capsys, "mask", "--inspect", str(tmp_path / "nowhere"))


def test_wrong_inputs(capsys, tmp_path):
    out = str(tmp_path / "run")
    assert "preset" in fails(capsys, "unlearn", "--preset", "svhn")
    assert "pecker, pecker+, relabel, retrain" in fails(capsys, "unlearn", "--method", "forget-me-not")
    assert "forget_classes is 12" in fails(capsys, "unlearn", "--forget_classes", "12", "--output_dir", out)
    assert "cover_class is 0" in fails(capsys, "unlearn", "--cover_class", "0", "--output_dir", out)
    assert "cover_class" in fails(capsys, "unlearn", "--cover_class", "one", "--output_dir", out)
    assert "density" in fails(capsys, "unlearn", "--density", "0", "--output_dir", out)
    assert "t_init" in fails(capsys, "unlearn", "--t_init", "1000", "--output_dir", out)
    assert "checkpoints_total_limit" in fails(capsys, "unlearn", "--checkpoints_total_limit", "0", "--output_dir", out)
    assert "max_train_stepz" in fails(capsys, "unlearn", "--max_train_stepz", "3")
    nowhere = str(tmp_path / "nowhere")
    assert "nowhere" in fails(capsys, "unlearn", "--pretrained_model_name_or_path", nowhere, "--output_dir", out)
    assert "pretrained_model_name_or_path" in fails(capsys, "unlearn", "--preset", "cifar10", "--output_dir", out)
    assert "no checkpoint" in fails(capsys, "unlearn", "--resume_from_checkpoint", "checkpoint-3", "--output_dir", out)
    assert "forget_class" in fails(capsys, "demo", "--forget-class", "10", "--output-dir", out)
    assert "t_init" in fails(capsys, "sample", "--sampler", "one_step", "--output", str(tmp_path / "a.png"))
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(capsys, "unlearn", "--output_dir", str(tmp_path / "file"), *SMALL)
    assert (tmp_path / "file").read_text() == "mine"
    # Another architecture, whose number of classes differs from the judge's.
    save_network(tmp_path / "tiny", tiny_unet(), NoiseSchedule.linear())
    tiny = ["--pretrained_model_name_or_path", str(tmp_path / "tiny")]
    assert "10 classes" in fails(capsys, "unlearn", *tiny, "--output_dir", out)
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").rglob("*.json")) == []


def test_a_checkpoint_of_another_network_is_refused(capsys, tmp_path):
    save_network(tmp_path / "a", tiny_unet(), NoiseSchedule.linear())
    save_network(tmp_path / "b", tiny_unet(block_out_channels=(8, 8)), NoiseSchedule.linear())
    common = ["--output_dir", str(tmp_path / "run"), *SMALL, *QUIET, "--no-evaluate"]
    main(["unlearn", "--pretrained_model_name_or_path", str(tmp_path / "a"), *common])
    capsys.readouterr()
    error = fails(
        capsys, "unlearn", "--pretrained_model_name_or_path", str(tmp_path / "b"), *common,
        "--resume_from_checkpoint", "latest",
    )  # fmt: skip
    assert "is of another run" in error and "pretrained_sha256" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_writes_checkpoint_and_prints_resume_command(tmp_path, number):
    save_network(tmp_path / "a", tiny_unet(), NoiseSchedule.linear())
    folder = tmp_path / "run"
    command = ["unlearn", "--pretrained_model_name_or_path", str(tmp_path / "a"), "--output_dir", str(folder), *SMALL]
    command += [*QUIET, "--no-evaluate", "--logging_steps", "1", "--overwrite_output_dir"]
    command[command.index("--max_train_steps") + 1] = "100000"
    process = processes.Process(["-m", "pecker_fast", *command])
    try:
        deadline = time.monotonic() + 400
        log = folder / "train.jsonl"
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number and number.name in output
    (step,) = (int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())
    words = shlex.split(output.strip().splitlines()[-1])
    assert words[0] == "pecker-fast" and "--overwrite_output_dir" not in words
    again = processes.Process(["-m", "pecker_fast", *words[1:]])
    try:
        deadline = time.monotonic() + 400
        while len(log.read_text().splitlines()) <= step and again.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        again.send_signal(number)
        assert again.wait(60) == 128 + number
    finally:
        again.kill()
        again.wait()
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [("cifar10", 32, (32, 32)), pytest.param("stl10", 64, (32, 32, 32), marks=pytest.mark.slow)],
)
def test_presets_of_photographs_run_from_a_folder_of_images(capsys, tmp_path, monkeypatch, name, size, channels):
    data = image_folder(tmp_path / "data")
    for module in (pretraining, task):
        monkeypatch.setattr(module, "pretrained_sampler", lambda *_: Sampler("ddim", num_inference_steps=2))
    main([
        "pretrain", "--preset", name, "--dataset_name", f"folder:{data}",
        "--block_out_channels", *map(str, channels), "--layers_per_block", "1", "--max_train_steps", "2",
        "--train_batch_size", "4", "--samples_per_class", "1", "--output_dir", str(tmp_path / "p"), *QUIET,
    ])  # fmt: skip
    network, _ = load_network(tmp_path / "p" / "unet")
    # A label for each class, and one for none.
    assert (network.config["sample_size"], network.config["num_class_embeds"]) == (size, 4)
    main([
        "unlearn", "--preset", name, "--pretrained_model_name_or_path", str(tmp_path / "p"), "--forget_classes", "2",
        "--cover_class", "0", "--forget_data", str(data), "--saliency_samples", "data", "--saliency_batch_size", "2",
        "--output_dir", str(tmp_path / "u"), *SMALL, "--max_train_steps", "2", *QUIET,
    ])  # fmt: skip
    assert "comes without a judge" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "u" / "metrics.json").read_text())
    assert metrics["iterations"] == 2 and "ua" not in metrics
    lines = [json.loads(line) for line in (tmp_path / "u" / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["mask_density"] == pytest.approx(0.5, abs=0.01)
    picture = tmp_path / "drawn.png"
    main(["sample", "--pretrained-model-name-or-path", str(tmp_path / "u"), "--output", str(picture)])
    assert Image.open(picture).size[0] > 10 * size


def test_missing_photographs(capsys, tmp_path):
    out = ["--output_dir", str(tmp_path / "run")]
    error = fails(capsys, "pretrain", "--preset", "cifar10", *out)
    assert "data_root is not given" in error and "folder:<path>" in error
    error = fails(capsys, "pretrain", "--preset", "stl10", "--data_root", str(tmp_path), *out)
    assert "STL-10 is not in" in error and "--download" in error
    error = fails(capsys, "pretrain", "--preset", "cifar10", "--dataset_name", f"folder:{tmp_path}", *out)
    assert "sub-folder" in error
    data = image_folder(tmp_path / "data", classes=2)
    error = fails(
        capsys, "pretrain", "--preset", "cifar10", "--dataset_name", f"folder:{data}", "--num_classes", "3", *out
    )
    assert "the 2 classes class0, class1" in error and "num_classes) 3 classes" in error
    (data / "class0" / "0.png").write_bytes(b"no image")
    error = fails(
        capsys, "pretrain", "--preset", "cifar10", "--dataset_name", f"folder:{data}", "--num_classes", "2",
        "--block_out_channels", "32", "32", "--max_train_steps", "2", "--no-evaluate", *QUIET, *out,
    )  # fmt: skip
    assert "0.png cannot be read as an image" in error


def test_unlearning_starts_from_a_checkpoint_of_the_public_code(capsys, tmp_path):
    live, averaged = AncestorUNet(32), AncestorUNet(32)
    path = tmp_path / "ckpt.pth"
    torch.save([live.state_dict(), {}, 3, dict(averaged.named_parameters())], path)
    common = ["--preset", "cifar10", "--pretrained_model_name_or_path", str(path), *SMALL, *QUIET, "--no-evaluate"]
    common += ["--max_train_steps", "1", "--saliency_batch_size", "2"]
    for state, model in (("auto", averaged), ("model", live)):
        folder = tmp_path / state
        main(["unlearn", *common, "--checkpoint_state", state, "--output_dir", str(folder)])
        network, _ = load_network(folder / "unet")
        # A step of the published learning rate away.
        assert (network.conv_in.weight - model.conv_in.weight).abs().max() < 1e-4
    assert "no weights score" in fails(capsys, "unlearn", *common, "--checkpoint_state", "score")
    path.write_bytes(path.read_bytes()[:1000])
    error = fails(capsys, "unlearn", *common, "--output_dir", str(tmp_path / "damaged"))
    assert "ckpt.pth" in error and not (tmp_path / "damaged").exists()


def test_names_on_the_hub(capsys, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    save_network(tmp_path / "cache" / "unet", tiny_unet(), NoiseSchedule.linear())
    downloads = []

    def fetch(name, allow_patterns, **options):
        downloads.append((name, [pattern for pattern in allow_patterns if "safetensors" in pattern]))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    common = ["--output_dir", str(tmp_path / "run"), *SMALL, *QUIET, "--no-evaluate", "--max_train_steps", "1"]
    main(["unlearn", "--pretrained_model_name_or_path", "someone/tiny-digits", *common])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["pretrained"] == "hub:someone/tiny-digits"
    # Its configuration is fetched first, then its weights only.
    (first, none), (second, weights) = downloads
    assert first == second == "someone/tiny-digits" and not none
    assert weights and all(pattern.startswith("unet/diffusion_pytorch_model") for pattern in weights)
    config = tmp_path / "cache" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_class_embeds": None}))
    downloads.clear()
    error = fails(capsys, "unlearn", "--pretrained_model_name_or_path", "someone/unconditional")
    assert "without class labels" in error and len(downloads) == 1

    def missing(name, **options):
        raise LocalEntryNotFoundError("not in the cache\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    error = fails(capsys, "unlearn", "--pretrained_model_name_or_path", "someone/other")
    assert "'someone/other'" in error and "not in the cache" in error and "and more" not in error
    # These names are not looked up on the hub.
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for name in ("runs/ckpt.pth", "runs/a/b", str(tmp_path / "nowhere")):
        error = fails(capsys, "mask", "--pretrained-model-name-or-path", name)
        assert f"pretrained_model_name_or_path is {name!r}: there is no such file or folder" in error
    error = fails(capsys, "unlearn", "--checkpoint_state", "ema")
    assert "checkpoint_state is 'ema'" in error


def test_a_pipeline_of_the_hub_without_a_network(tmp_path, monkeypatch, capsys):
    """From the hub's cache, as diffusers has it; drawn in one step, as its model_index.json says."""
    cache = tmp_path / "models--someone--digits"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    save_one_step_pipeline(cache / "snapshots" / ("0" * 40), tiny_unet(), NoiseSchedule.linear(), 250)
    # As if HF_HUB_OFFLINE and HF_HUB_CACHE had been set before huggingface_hub was imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    drawn = ["--output", str(tmp_path / "drawn.png"), "--images-per-class", "1"]
    main(["sample", "--pretrained-model-name-or-path", "someone/digits", *drawn])
    output = capsys.readouterr().out
    assert "hub:someone/digits" in output and "sampler one_step" in output
    assert (tmp_path / "drawn.png").stat().st_size > 0
    error = fails(capsys, "sample", "--pretrained-model-name-or-path", "someone/else", *drawn)
    assert "HF_HUB_OFFLINE is set" in error and "'someone/else'" in error
