"""Runs that go on: longer than they were, from an empty folder, and by the command that is printed."""

import json
import shlex
import signal
import sys

import pytest

from pecker_fast.cli import main
from pecker_fast.runs.running import how_to_resume, without_options
from pecker_fast.training.loop import Progress
from tests.commands.case import QUIET, SMALL, fails

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_a_longer_run_is_what_it_would_have_been_from_the_start(capsys, tmp_path):
    """With a constant learning rate, bit for bit."""
    small = [*SMALL[2:], *QUIET, "--lr_scheduler", "constant", "--no-evaluate", "--resume_from_checkpoint", "latest"]

    def run(name: str, steps: int, *words: str) -> list[str]:
        main(["unlearn", "--output_dir", str(tmp_path / name), "--max_train_steps", str(steps), *small, *words])
        return capsys.readouterr().err.splitlines()

    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run("whole", 6) == [f"pecker-fast: {whole} has no checkpoint yet: the run starts from the beginning"]
    run("part", 4)
    four = (part / WEIGHTS).read_bytes()
    assert run("part", 6) == ["pecker-fast: max_train_steps was 4 and is 6: the run goes on from step 4"]
    assert (part / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes() != four
    metrics = json.loads((part / "metrics.json").read_text())
    assert (
        metrics["iterations"] == 6 and json.loads((part / "config.json").read_text())["options"]["max_train_steps"] == 6
    )
    # What may change, and what may not.
    error = fails(capsys, "unlearn", "--output_dir", str(part), "--max_train_steps", "5", *small)
    assert "options.max_train_steps is 6 there and 5 here (only max_train_steps may be larger; how often" in error
    assert run("part", 6, "--logging_steps", "3", "--checkpointing_steps", "2") == []
    # A run that has ended is not lost because its checkpoints are gone.
    for path in sorted((part / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    error = fails(capsys, "unlearn", "--output_dir", str(part), "--max_train_steps", "6", *small)
    assert "has a run that has ended, and none of its checkpoints: it cannot be continued" in error
    assert (part / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_run_that_goes_on_has_not_ended(capsys, tmp_path, monkeypatch):
    """If it is killed before its new end, it is no finished run with the old figures."""
    folder = tmp_path / "run"
    words = ["unlearn", "--output_dir", str(folder), *SMALL[2:], *QUIET, "--no-evaluate"]
    main([*words, "--max_train_steps", "3"])
    assert (folder / "metrics.json").is_file()

    def killed(self):
        raise RuntimeError("killed")

    monkeypatch.setattr("pecker_fast.training.loop.Loop.run", killed)
    capsys.readouterr()
    fails_words = [*words, "--max_train_steps", "5", "--resume_from_checkpoint", "checkpoint-3"]
    with pytest.raises(SystemExit):
        main(fails_words)
    assert not (folder / "metrics.json").exists()


@pytest.mark.parametrize(
    ("started", "made", "expected"),
    [
        # Neither repeated nor misplaced, however it was written.
        (
            "unlearn --resume_from_checkpoint latest --seed 1",
            "unlearn",
            "unlearn --seed 1 --resume_from_checkpoint latest",
        ),
        (
            "unlearn --resume-from-checkpoint=checkpoint-3 --overwrite_output_dir --forget_classes 0 3",
            "unlearn",
            "unlearn --forget_classes 0 3 --resume_from_checkpoint latest",
        ),
        (
            "unlearn --config a.yaml --overwrite-output-dir --seed 2",
            "unlearn",
            "unlearn --config a.yaml --seed 2 --resume_from_checkpoint latest",
        ),
        # The distillation that a run needs first, and commands that make several runs: the same command.
        ("unlearn --method patch --overwrite_output_dir", "distil", "unlearn --method patch --overwrite_output_dir"),
        ("compare --methods a,b", "unlearn", "compare --methods a,b"),
        ("sequence", "unlearn", "sequence"),
        ("demo --seed 1", "unlearn", "demo --seed 1 --resume"),
        ("demo --resume", "pretrain", "demo --resume"),
    ],
)
def test_the_printed_command_goes_on(monkeypatch, started, made, expected):
    progress = Progress(step=7, stopped_by=signal.SIGTERM)
    command = [made, "--preset", "digits", "--overwrite_output_dir", "--resume_from_checkpoint", "latest"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pecker-fast", *started.split()])
    text, line = how_to_resume(progress, command).split("\n")
    assert text == "SIGTERM: stopped after step 7, with a checkpoint. Continue with"
    assert line == f"  pecker-fast {expected}"
    # From Python: the words of the run.
    monkeypatch.setattr(sys, "argv", ["train.py", "unlearn", "3"])
    assert how_to_resume(progress, command).endswith(f" {made} --preset digits --resume_from_checkpoint latest")


def test_words_without_options():
    words = shlex.split("a --x 1 --y --x=2 'b c' --no-x z")
    assert without_options(words, ("x",)) == ["a", "--y", "b c", "--no-x", "z"]
