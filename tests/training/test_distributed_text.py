"""Two processes, connected by gloo on the loopback, on a small Stable Diffusion, from the command line."""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pecker_fast.cli import main
from pecker_fast.hashing import weights_hash
from pecker_fast.models import StableDiffusion
from pecker_fast.runs.fisher_file import FisherFacts, save_fisher
from pecker_fast.training.state import load_state
from pecker_fast.unlearning import Placement, method_class
from tests.diffusion.tiny_sd import tiny_unet, write_stable_diffusion
from tests.inputs import same_bits
from tests.training.test_distributed import finish, iou, losses, start

# Attention on the way down and in the middle: FSDP takes its time for each layer, whatever its size.
BLOCKS = {"up_block_types": ("UpBlock2D", "UpBlock2D")}
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(folder: Path, method: str, *more: str) -> list[str]:
    """The command line of a small run of two iterations; writes the model that it needs into ``folder``/base."""
    if not (folder / "base").exists():
        # A fixed seed: losses near zero would have larger relative differences.
        torch.manual_seed(0)
        write_stable_diffusion(folder / "base", **BLOCKS)
        tiny_unet(**BLOCKS).save_pretrained(folder / "score")
        (folder / "retain.txt").write_text("a dog\na cat\na tree\n")
        (folder / "pictured.txt").write_text("{concept}\n")
    return [
        "unlearn", "--preset", "sd15-celebrity", "--method", method, "--device", "cpu", "--no-progress_bar",
        "--pretrained_model_name_or_path", str(folder / "base"), "--retain_prompts", str(folder / "retain.txt"),
        "--teacher_dtype", "float32", "--max_train_steps", "2", "--sample_prompts", str(folder / "pictured.txt"),
        "--sample_steps", "1", "--samples_per_prompt", "1", "--checkpointing_steps", "1", "--logging_steps", "1",
        "--checkpoints_total_limit", "9", *more,
    ]  # fmt: skip


def run_two(folder: Path, words: list[str]) -> dict[str, list[dict]]:
    """The tensors of both processes after the whole run, and after the resumed one."""
    started = start(["-m", "tests.training.rank_text", str(folder), free_port(), *words], 2)
    for status, _, errors in finish(started):
        assert status == 0, errors
    return {name: [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)] for name in ("rank", "again")}


def check_equal_bits(results: dict[str, list[dict]]) -> None:
    """Both processes end with the same bits, and so does the resumed run."""
    first, second = results["rank"]
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert same_bits(value, second[key]), key
        for again in results["again"]:
            assert same_bits(value, again[key]), key


def check_losses(folder: Path, words: list[str], lines: int) -> None:
    """One process, in ``folder``/one, has the losses of the two."""
    (folder / "one").mkdir()
    main([*words, "--output_dir", str(folder / "one" / "run")])
    alone, together = losses(folder / "one"), losses(folder)
    assert len(alone) == len(together) == lines
    for one, many in zip(alone, together, strict=True):
        assert many == pytest.approx(one, rel=1e-5)


def test_two_processes_agree_with_one_and_resume(tmp_path):
    # Adam's first steps have full size even for rounding errors, so learning rates just suffice to show a step.
    rates = ["--score_learning_rate", "1e-4", "--generator_learning_rate", "1e-4"]
    small = ["--gradient_accumulation_steps", "1", "--saliency_batches", "1", "--mask_refresh_steps", "1"]
    # Losses depend on the difference between score network and teacher: start from another network.
    words = command(tmp_path, "pecker", *rates, *small, "--initial_score", str(tmp_path / "score"))
    results = run_two(tmp_path, words)
    first = results["rank"][0]
    assert any(key.startswith("score.") for key in first) and "mask" in first
    check_equal_bits(results)
    check_losses(tmp_path, words, 2)
    actual = {name: json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("config", "metrics")}
    assert actual["config"]["num_processes"] == 2 and actual["metrics"]["images"] == 4
    files = [folder / "mask.safetensors" for folder in (tmp_path / "run", tmp_path / "one" / "run")]
    assert iou(*(load_file(file)["words"] for file in files)) >= 0.999
    # The saved pipeline has the processes' weights.
    saved = load_file(tmp_path / "run" / WEIGHTS)
    assert all(same_bits(saved[key.removeprefix("kept.")], first[key]) for key in first if key.startswith("kept."))


def tensors_of(tree, place: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's state, by their places."""
    if isinstance(tree, torch.Tensor):
        return {place: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in tensors_of(value, f"{place}.{key}").items()}


def differing_share(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float = 0.0) -> float:
    """Share of the entries that differ by more than 1e-6 and more than a ``share`` of the expected value. A few may
    differ: Adam takes full steps even of rounding errors."""
    pairs = [(value, expected[key]) for key, value in actual.items()]
    return torch.cat([((a - b).abs() > 1e-6 + share * b.abs()).flatten() for a, b in pairs]).double().mean().item()


def check_states(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same tensors, with the same numbers up to rounding."""
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        assert (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype), key
    words = [key for key, value in actual.items() if value.dtype == torch.int32 and value.ndim == 1]
    for key in words:
        assert iou(actual[key], expected[key]) >= 0.999, key
    for kind in (".state.score.", ".state.generator.", ".state.score_optimizer.", ".state.generator_optimizer."):
        keys = [key for key in actual if key.startswith(kind) and actual[key].is_floating_point()]
        # Relative to the largest second moment: gradients differ by rounding of the largest ones.
        most = max(expected[key].abs().max() for key in keys) if "optimizer" in kind else 1.0
        one, two = ({key: values[key] / most for key in keys} for values in (actual, expected))
        assert differing_share(one, two, 1e-3 if "optimizer" in kind else 0.0) < 1e-3, kind


RATES = ["--score_learning_rate", "1e-4", "--generator_learning_rate", "1e-4"]


def check_one_process(folder: Path, words: list[str], steps: int) -> None:
    """The sharded run has the losses and the last checkpoint of a run in one process."""
    check_losses(folder, words, steps)
    runs = [folder / "run", folder / "one" / "run"]
    place = Path("checkpoints") / f"checkpoint-{steps}" / "state.safetensors"
    check_states(*(tensors_of(load_state(run / place)) for run in runs))
    logs = [(run / "train.jsonl").read_text().splitlines() for run in runs]
    for together, alone in zip(*logs, strict=True):
        assert json.loads(together).get("mask_density") == json.loads(alone).get("mask_density")
    assert differing_share(*(load_file(run / WEIGHTS) for run in runs)) < 1e-3


@pytest.mark.slow
def test_fsdp_weights(tmp_path):
    """FSDP2: the same bits on all processes, the numbers of one process, checkpoints that one process can resume."""
    steps = ["--gradient_accumulation_steps", "2", "--saliency_batches", "2", "--mask_refresh_steps", "1"]
    words = command(tmp_path, "pecker", *RATES, *steps, "--initial_score", str(tmp_path / "score"))
    check_equal_bits(run_two(tmp_path, [*words, "--fsdp"]))
    check_one_process(tmp_path, words, 2)
    alone = tmp_path / "alone" / "run"
    shutil.copytree(tmp_path / "run", alone)
    main([*words, "--output_dir", str(alone), "--resume_from_checkpoint", "checkpoint-1"])
    assert differing_share(*(load_file(run / WEIGHTS) for run in (alone, tmp_path / "run"))) < 1e-3


def test_fsdp_weights_in_two_stages(tmp_path):
    """The second stage starts from the first; theta draws again between its forward and backward pass."""
    stages = ["--two_stage", "--first_stage_steps", "1", "--regression_weight", "0.5"]
    options = ["--no-gradient_checkpointing", "--channels_last", "True", "--initial_score", str(tmp_path / "score")]
    # Only the last checkpoint is read.
    options += ["--checkpointing_steps", "3"]
    words = command(tmp_path, "sfd", *RATES, *stages, *options)
    started = start(["-m", "pecker_fast", *words, "--fsdp", "--output_dir", str(tmp_path / "run")], 2)
    for status, _, errors in finish(started):
        assert status == 0, errors
    check_one_process(tmp_path, words, 3)


def test_fsdp_refusals(tmp_path, capsys):
    """All are refused before anything is written."""
    cases = [
        ("pecker", [], "one process: start several with torchrun"),
        ("esd", [], "esd shards no networks: it is for pecker, pecker+ and sfd"),
    ]
    for method, more, message in cases:
        words = command(tmp_path, method, "--fsdp", "--output_dir", str(tmp_path / "run"), *more)
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
    kind, options = method_class("pecker"), method_class("pecker").Options()
    Placement(fsdp=True).check_method(kind, options, processes=2, compile=False)
    for placement, changes, compile, message in (
        ({}, {}, True, "torch_compile: expected one of them"),
        ({"score_lora_rank": 4}, {}, False, "score_lora_rank"),
        ({}, {"cuda_graphs": True}, False, "cuda_graphs"),
    ):
        with pytest.raises(ValueError, match=message):
            changed = replace(options, **changes)
            Placement(fsdp=True, **placement).check_method(kind, changed, processes=2, compile=compile)


@pytest.mark.slow
def test_selective_amnesia_on_two_processes(tmp_path):
    fisher = tmp_path / "fisher.safetensors"
    small = ["--train_batch_size", "2", "--surrogate_images", "3", "--replay_images", "3", "--replay_steps", "2"]
    small += ["--num_inference_steps", "1", "--learning_rate", "1e-4", "--replay_batch_size", "6"]
    words = command(tmp_path, "selective_amnesia", *small, "--fisher", str(fisher))
    unet = StableDiffusion(tmp_path / "base").load_unet()
    values = {name: torch.rand(param.shape) for name, param in unet.named_parameters()}
    save_fisher(fisher, values, FisherFacts(weights_hash(unet), "mean", 1, 1))
    results = run_two(tmp_path, words)
    assert len(results["rank"][0]) == len(values)
    check_equal_bits(results)
    # One line for drawing, two for steps.
    check_losses(tmp_path, words, 3)
