"""The loop: resumption, signals, kills, non-finite losses, logs."""

import contextlib
import json
import math
import os
import signal

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.files import append_line
from pecker_fast.models import save_network
from pecker_fast.records import read_lines
from pecker_fast.training.checkpoints import STATE, CheckpointError
from pecker_fast.training.loop import Loop, LoopOptions, NonFiniteError
from pecker_fast.training.state import load_state
from pecker_fast.unlearning import Phase
from tests import processes
from tests.diffusion.toy import tiny_unet
from tests.inputs import same_bits
from tests.training.test_state import assert_equal_trees


class Walk(Phase):
    """A random walk whose steps depend on the iteration alone."""

    images_per_iteration = 4

    def __init__(self, name: str, iterations: int, action=None) -> None:
        self.name, self.iterations, self.action = name, iterations, action
        self.weight, self.started = torch.zeros(3), 0

    def start(self, previous):
        self.started += 1
        if previous is not None:
            self.weight = previous.weight * 2

    def step(self, iteration):
        generator = torch.Generator().manual_seed(hash((self.iterations, iteration)) % 2**31)
        self.weight = self.weight * 0.9 + torch.randn(3, generator=generator)
        loss = self.action(iteration) if self.action else float(iteration)
        return {"loss": torch.tensor(1.0 if loss is None else loss)}

    def describe(self):
        return {"said": self.name}

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]

    def trained_parameters(self):
        return [self.weight]

    @contextlib.contextmanager
    def averaged(self):
        # In place of a network.
        yield self.name


def make(folder, *phases, resume=None, evaluate=None, stop_at_nonfinite=True, **options) -> Loop:
    folder.mkdir(exist_ok=True)
    options = {"logging_steps": 2, "checkpointing_steps": 3, "validation_steps": 4, **options}
    options = LoopOptions(resume_from_checkpoint=resume, **options)
    how = {"evaluate": evaluate, "stop_at_nonfinite": stop_at_nonfinite, "show_progress": False}
    return Loop(phases, folder, options, {"run": 1}, **how)


def test_phases_in_order_logs_and_evaluations(tmp_path):
    calls = []
    a, b = Walk("a", 5), Walk("b", 6)
    progress = make(tmp_path, a, b, evaluate=lambda network, step: calls.append((network, step)) or {"ua": step}).run()
    assert (progress.step, progress.images, progress.stopped_by) == (11, 44, None)
    assert a.started == b.started == 1
    lines = read_lines(tmp_path / "train.jsonl")
    assert [(line["phase"], line["iteration"], line["step"]) for line in lines] == [
        ("a", 2, 2), ("a", 4, 4), ("a", 5, 5), ("b", 1, 6), ("b", 3, 8), ("b", 5, 10), ("b", 6, 11),
    ]  # fmt: skip
    # Means since the previous line.
    assert [line["loss"] for line in lines] == [0.5, 2.5, 4.0, 0.0, 1.5, 3.5, 5.0]
    assert lines[0]["said"] == "a" and lines[-1]["images"] == 44 and lines[0]["seconds"] > 0
    assert calls == [("a", 4), ("a", 5), ("b", 8), ("b", 11)]
    assert [line["ua"] for line in read_lines(tmp_path / "evaluation.jsonl")] == [4, 5, 8, 11]
    assert make(tmp_path, a, b).checkpoints.steps() == [3, 6, 9, 11]


@pytest.mark.parametrize("stop", [3, 5, 6, 9])
def test_resumed_runs_are_the_same(tmp_path, stop):
    whole = Walk("a", 5), Walk("b", 6)
    make(tmp_path / "whole", *whole, checkpointing_steps=1).run()
    phases = Walk("a", 5), Walk("b", 6)
    make(tmp_path / "part", *phases, checkpointing_steps=1).run()
    append_line(tmp_path / "part" / "train.jsonl", {"step": 99})
    with open(tmp_path / "part" / "train.jsonl", "a") as file:
        file.write('{"step": 1')
    phases = Walk("a", 5), Walk("b", 6)
    resumed = make(tmp_path / "part", *phases, resume=f"checkpoint-{stop}", checkpointing_steps=1)
    progress = resumed.run()
    assert progress.step == 11 and progress.images == 44
    assert same_bits(phases[1].weight, whole[1].weight)
    assert phases[0].started == 0 and phases[1].started == (1 if stop <= 5 else 0)
    lines, expected = (read_lines(tmp_path / name / "train.jsonl") for name in ("part", "whole"))
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines} | {11})
    assert {line["step"] for line in expected} == {line["step"] for line in lines}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_run_with_a_checkpoint(tmp_path, number):
    before = signal.getsignal(number)
    phase = Walk("a", 50, lambda i: os.kill(os.getpid(), number) if i == 6 else 1.0)
    loop = make(tmp_path, phase, checkpointing_steps=100)
    progress = loop.run()
    assert progress.stopped_by == number and progress.step == 7
    assert loop.checkpoints.load("latest")[0] == 7
    assert signal.getsignal(number) is before
    again, whole = Walk("a", 50), Walk("a", 50)
    make(tmp_path, again, resume="latest").run()
    make(tmp_path / "whole", whole).run()
    assert same_bits(again.weight, whole.weight)


def test_non_finite_losses_stop_the_run(tmp_path):
    phase = Walk("a", 20, lambda i: math.nan if i == 10 else 1.0)
    loop = make(tmp_path, phase)
    with pytest.raises(NonFiniteError, match=r"loss became inf or NaN by step 12.*checkpoint-9 is the last good"):
        loop.run()
    assert loop.checkpoints.steps() == [3, 6, 9]
    loop = make(tmp_path / "on", Walk("a", 20, lambda i: math.nan if i == 10 else 1.0), stop_at_nonfinite=False)
    assert loop.run().step == 20
    assert [line["loss"] for line in read_lines(tmp_path / "on" / "train.jsonl")].count(None) == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    phase = Walk("a", 20)
    phase.action = lambda i: (phase.weight.fill_(math.inf), 1.0)[1] if i == 3 else 1.0
    loop = make(tmp_path, phase)
    with pytest.raises(NonFiniteError, match="a weight became inf or NaN by step 6"):
        loop.run()
    assert loop.checkpoints.steps() == [3]


def test_wrong_options_and_checkpoints(tmp_path):
    for name in ("logging_steps", "checkpointing_steps", "validation_steps"):
        with pytest.raises(ValueError, match=name):
            make(tmp_path, Walk("a", 2), **{name: 0})
    append_line(tmp_path / "train.jsonl", {"step": 1})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        make(tmp_path, Walk("a", 2), resume="latest").run()
    assert read_lines(tmp_path / "train.jsonl") == [{"step": 1}]


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, seed):
    network = tiny_unet(dropout=0.1)
    save_network(tmp_path / "network", network, NoiseSchedule.linear())

    def run(folder: str, moments: int, killed: bool) -> dict:
        script = ["-m", "tests.training.killed_runs", str(tmp_path / "network"), str(tmp_path / folder), str(moments)]
        result = processes.run(
            [*script, "pecker", *["0"] * (not killed)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    whole, killed = run("whole", seed, False), run("killed", seed, True)
    assert whole == {"kills": 0, "early": 0, "status": 0}
    assert killed["status"] == 0 and killed["kills"] >= 2
    for name in ("unet/diffusion_pytorch_model.safetensors", "checkpoints/checkpoint-12/unet/config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    states = [load_state(tmp_path / run / "checkpoints" / "checkpoint-12" / STATE) for run in ("whole", "killed")]
    for state in states:
        del state["seconds"]
    assert_equal_trees(*states)
    logs = [read_lines(tmp_path / name / "train.jsonl") for name in ("whole", "killed")]
    plain = [[{k: v for k, v in line.items() if k != "seconds" and "loss" not in k} for line in log] for log in logs]
    assert plain[0] == plain[1]
