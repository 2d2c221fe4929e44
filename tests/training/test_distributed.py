"""Runs on several processes, connected by gloo on the loopback."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.models import save_network
from pecker_fast.parallel import ProcessLostError, World
from pecker_fast.unlearning import ForgetRequest, method_class
from tests import processes
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.processes import Process
from tests.training import rank
from tests.unlearning.settings import setting_of


def start(command: list[str], count: int) -> list[Process]:
    """``count`` processes with the variables that torchrun sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [Process(command, {**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(count)]


def finish(started: list[Process], seconds: float = 400) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each process; all are ended."""
    try:
        end = time.monotonic() + seconds
        outputs = [process.communicate(timeout=max(1, end - time.monotonic())) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, outputs, strict=True)]
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(folder: Path, count: int, *arguments: str) -> list[dict[str, torch.Tensor]]:
    if count == 1:
        rank.main(str(folder), *arguments)
        return [load_file(folder / "rank-0.safetensors")]
    started = start(["-m", "tests.training.rank", str(folder), *arguments], count)
    for status, _, errors in finish(started):
        assert status == 0, errors
    return [load_file(folder / f"rank-{i}.safetensors") for i in range(count)]


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run" / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name.startswith("loss")} for line in lines]


def check_losses(one: dict[str, float], many: dict[str, float]) -> None:
    """The losses agree to rounding, which is relative to their terms. Those of a generator's loss_forget have either
    sign, may cancel, and are as large as those of loss_distill."""
    assert one.keys() == many.keys()
    for name, loss in one.items():
        size = max(abs(loss), abs(one.get("loss_distill", loss))) if name == "loss_forget" else abs(loss)
        # Float32 sums of some thousand terms in another order, and weights that differ by such sums: 100 roundings.
        assert many[name] == pytest.approx(loss, rel=0, abs=100 * 2**-24 * size), name


def folder_with_network(path: Path) -> Path:
    torch.manual_seed(0)
    save_network(path / "network", tiny_unet(dropout=0.0, null_label=True), NoiseSchedule.linear())
    return path


def iou(a: torch.Tensor, b: torch.Tensor) -> float:
    bits = torch.arange(32, dtype=torch.int32)
    a, b = ((words[:, None] >> bits) & 1 for words in (a, b))
    return ((a & b).sum() / (a | b).sum()).item()


def test_two_and_three_processes_agree_with_one(tmp_path):
    folders = {count: folder_with_network(tmp_path / str(count)) for count in (1, 2, 3)}
    ended = {count: run(folder, count, "pecker", "4") for count, folder in folders.items()}
    (alone,) = ended[1]
    for count in (2, 3):
        for other in ended[count][1:]:
            assert all(same_bits(ended[count][0][name], other[name]) for name in other)
        assert iou(alone["mask"], ended[count][0]["mask"]) >= 0.999
        for one, many in zip(losses(folders[1]), losses(folders[count]), strict=True):
            assert one.keys() == many.keys() and len(one) == 4
            for name in one:
                assert many[name] == pytest.approx(one[name], rel=1e-5), (count, name)
        check_averaged(folders[count] / "run", ended[count][0])


def check_averaged(folder: Path, ended: dict[str, torch.Tensor]) -> None:
    """Evaluations and checkpoints receive the averaged network."""
    end = {name.removeprefix("ema."): value for name, value in ended.items() if name.startswith("ema.")}
    evaluations = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [2, 4]
    size = sum(float(value.double().square().sum()) for value in end.values())
    assert evaluations[-1]["size"] == pytest.approx(size, rel=1e-12)
    exported = load_file(folder / "checkpoints" / "checkpoint-4" / "averaged.safetensors")
    assert exported.keys() == end.keys() and all(same_bits(exported[name], end[name]) for name in end)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        slow("sfd", ["gradient_accumulation_steps=2"]),
        slow("pecker", ['update="alternate"', "saliency_batches=2", 'saliency_samples="current"']),
        ("patch", ["saliency_chunks=4", "score_density=0.5"]),
        slow("salun", ["max_grad_norm=0.01"]),
        slow(
            "selective_amnesia",
            [
                "replay_images_per_class=4",
                "replay_steps=2",
                "fisher_batch_size=2",
                "fisher_timesteps=6",
                "fisher_chunks=2",
            ],
        ),
        ("esd", ["trajectory_steps=4", "max_grad_norm=0.01"]),
    ],
)
def test_other_ways_of_updating_agree_with_one(tmp_path, name, options):
    folders = [folder_with_network(tmp_path / str(count)) for count in (1, 2)]
    (_,), (first, second) = run(folders[0], 1, name, "2", *options), run(folders[1], 2, name, "2", *options)
    assert all(same_bits(first[key], second[key]) for key in first)
    for one, many in zip(losses(folders[0]), losses(folders[1]), strict=True):
        check_losses(one, many)


def test_a_run_resumes_to_the_same_bits(tmp_path):
    whole, halves = folder_with_network(tmp_path / "whole"), folder_with_network(tmp_path / "halves")
    expected = run(whole, 2, "pecker", "6")
    # A signal to one process stops all of them, after the same iteration.
    stopped = run(halves, 2, "pecker", "6", "signal=1")
    assert [int(one["step"]) for one in stopped] == [3, 3]
    resumed = run(halves, 2, "pecker", "6", "resume=1")
    for before, after in zip(expected, resumed, strict=True):
        assert all(same_bits(before[name], after[name]) for name in before)
    assert losses(whole) == losses(halves)


def test_errors_from_lost_processes_differ_from_own_faults():
    two = World(0, 2)
    for error in (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:5] reset"), dist.DistNetworkError("gone")):
        with pytest.raises(ProcessLostError, match=r"another process of this run ended.*latest"), two.watched():
            raise error
    with pytest.raises(RuntimeError, match=r"^a fault of our own$"), two.watched():
        raise RuntimeError("a fault of our own")
    with pytest.raises(dist.DistNetworkError), World().watched():
        raise dist.DistNetworkError("not of this run")


def test_the_loss_of_a_process_ends_the_others_with_a_message(tmp_path):
    folder = folder_with_network(tmp_path)
    started = start(["-m", "tests.training.rank", str(folder), "pecker", "1000", "slow=1"], 3)
    log = folder / "run" / "train.jsonl"
    deadline = time.monotonic() + 90
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    started[1].kill()
    begin = time.monotonic()
    ended = finish(started, 60)
    assert time.monotonic() - begin < 40
    assert ended[1][0] == -signal.SIGKILL
    for status, _, errors in (ended[0], ended[2]):
        assert status == 1 and "another process of this run ended" in errors
        assert "--resume_from_checkpoint latest" in errors


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path):
    network = folder_with_network(tmp_path) / "network"
    command = [
        "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--standalone",
        "-m", "pecker_fast", "unlearn", "--pretrained_model_name_or_path", str(network), "--device", "cpu",
        "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2", "--train_batch_size", "4",
        "--forget_batch_size", "2", "--saliency_batch_size", "4", "--no-evaluate", "--no-progress_bar",
    ]  # fmt: skip
    result = processes.run(command, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("report:") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["iterations"], metrics["images"]) == (2, 8)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_processes"] == 2
    command[command.index("--train_batch_size") + 1] = "5"
    command.append("--overwrite_output_dir")
    for status, _, errors in finish(start(command[command.index("pecker_fast") - 1 :], 2)):
        assert status == 2 and "train_batch_size is 5, expected a multiple of 2" in errors


def test_indivisible_batches_are_refused():
    request, teacher = ForgetRequest.of(tiny_unet(), [0], 1), tiny_unet()
    setting = setting_of(teacher=teacher, schedule=NoiseSchedule.linear(), request=request, world=World(0, 3))
    kind = method_class("pecker")
    for name in ("train_batch_size", "forget_batch_size", "saliency_batch_size"):
        sizes = {"train_batch_size": 6, "forget_batch_size": 3, "saliency_batch_size": 9, name: 4}
        with pytest.raises(ValueError, match=f"{name} is 4, expected a multiple of 3"):
            kind(setting, kind.Options(**sizes))
