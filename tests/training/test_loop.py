"""The loop: resumption, signals, kills, non-finite losses, logs."""

import contextlib
import io
import json
import math
import os
import signal

import pytest
import torch
from tqdm import tqdm

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.files import append_line
from pecker_fast.models import save_network
from pecker_fast.records import read_lines
from pecker_fast.training import loop as loop_module
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
    with pytest.raises(CheckpointError, match=r"'checkpoint-1', no such folder; .* has no checkpoint"):
        make(tmp_path, Walk("a", 2), resume="checkpoint-1").run()
    assert read_lines(tmp_path / "train.jsonl") == [{"step": 1}]


def test_latest_without_a_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    """Jobs that may be stopped at any moment are always started with the same command."""
    append_line(tmp_path / "train.jsonl", {"step": 1})
    phase = Walk("a", 5)
    assert make(tmp_path, phase, resume="latest").run().step == 5 and phase.started == 1
    line = f"pecker-fast: {tmp_path} has no checkpoint yet: the run starts from the beginning\n"
    assert capsys.readouterr().err == line
    assert [line["step"] for line in read_lines(tmp_path / "train.jsonl")] == [2, 4, 5]


def test_a_run_that_has_ended_goes_on_if_it_becomes_longer(tmp_path, capsys):
    def loop(folder, length, resume=None, **more) -> Loop:
        phase = Walk("a", length)

        def step(i):
            # The same walk, whatever its length.
            phase.weight = phase.weight * 0.9 + i
            return {"loss": torch.tensor(1.0)}

        phase.step = step
        folder.mkdir(exist_ok=True)
        fingerprint = {"seed": 1, "options": {"max_train_steps": length, "density": 0.5, **more}}
        return Loop([phase], folder, LoopOptions(2, 3, None, resume, 4), fingerprint, show_progress=False)

    whole, short = loop(tmp_path / "whole", 9), loop(tmp_path / "part", 4)
    assert (whole.run().step, short.run().step) == (9, 4)
    longer = loop(tmp_path / "part", 9, "latest")
    assert longer.run().step == 9 and same_bits(longer.phases[0].weight, whole.phases[0].weight)
    assert [line["step"] for line in read_lines(tmp_path / "part" / "train.jsonl")] == [2, 4, 6, 8, 9]
    assert capsys.readouterr().err == "pecker-fast: max_train_steps was 4 and is 9: the run goes on from step 4\n"
    refused = (
        (8, {}, r"options.max_train_steps is 9 there and 8 here \(only max_train_steps.*checkpoint checkpoint-4"),
        (12, {"density": 0.1}, r"options.density is 0.5 there and 0.1 here .*; there is no earlier one of this run"),
    )
    for length, more, message in refused:
        with pytest.raises(CheckpointError, match=f"checkpoint-9 is of another run: {message}"):
            loop(tmp_path / "part", length, "latest", **more).run()
    loop(tmp_path / "linear", 4, lr_scheduler="linear").run()
    loop(tmp_path / "linear", 6, "latest", lr_scheduler="linear").run()
    assert "goes on from step 4, with the learning rates of a run of 6" in capsys.readouterr().err


def test_the_hint_names_a_checkpoint_that_can_be_resumed(tmp_path):
    make(tmp_path, Walk("a", 9)).run()
    (tmp_path / "checkpoints" / "checkpoint-9" / STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is damaged.*--resume_from_checkpoint checkpoint-6"):
        make(tmp_path, Walk("a", 9), resume="latest").run()
    # With other options the earlier ones would be refused, too.
    other = Loop([Walk("a", 9)], tmp_path, LoopOptions(resume_from_checkpoint="latest"), {"run": 2})
    with pytest.raises(CheckpointError, match=r"is damaged.*there is no earlier one of this run"):
        other.run()


def test_the_bar_shows_ua_and_losses(tmp_path, monkeypatch):
    bars, shown = [], []

    class Bar(tqdm):
        def __init__(self, *args, **how):
            how |= {"file": io.StringIO(), "mininterval": 0, "dynamic_ncols": False, "ncols": 120}
            super().__init__(*args, **how)
            bars.append(self)

    def loss(iteration: int) -> float:
        shown.append(bars[0].postfix)
        return math.nan if iteration == 5 else 1 / (iteration + 1)

    monkeypatch.setattr(loop_module, "tqdm", Bar)
    measured = {"ua": 97.25, "retain_accuracy": 90.0, "diversity": 1.0}
    run = make(tmp_path, Walk("forget", 6, loss), evaluate=lambda network, step: measured, stop_at_nonfinite=False)
    run.show_progress = True
    run.run()
    # Means of two iterations each; the evaluation is after four.
    late = "UA=97.2%, retained=90.0%, loss=0.292"
    assert [text or "" for text in shown] == ["", "", "loss=0.75", "loss=0.75", late, late]
    last = bars[0].fp.getvalue().split("\r")[-1]
    assert last.startswith("forget: 100%") and "6/6" in last and "UA=97.2%, retained=90.0%, loss=nan" in last


@pytest.mark.slow
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_last_evaluation_is_not_lost(tmp_path, number):
    """Otherwise the run would measure and report for minutes, and end with status 0."""

    def evaluate(network, step):
        if step == 6:
            os.kill(os.getpid(), number)
        return {"ua": step}

    progress = make(tmp_path, Walk("a", 6), evaluate=evaluate).run()
    assert progress.stopped_by == number and progress.step == 6
    # What is left to do is done by the resumed run.
    resumed = make(tmp_path, Walk("a", 6), evaluate=evaluate, resume="latest").run()
    assert resumed.stopped_by is None and resumed.step == 6
    assert [line["step"] for line in read_lines(tmp_path / "evaluation.jsonl")][-1] == 6
