"""Runs that earlier code made are reported, evaluated, resumed and compared.

``fixtures/make_old_runs.py`` wrote ``fixtures/old_runs.tar.xz`` at commit 794560c: a run on the digits with the samples
of an evaluation, its comparison with a second run, and a run on a small Stable Diffusion. The first and the last have
ended after four iterations and keep the checkpoint of the second.
"""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pecker_fast.cli import main
from pecker_fast.environment import environment
from tests.inputs import same_bits
from tests.report.test_render import check_page

pytest.importorskip("sklearn")
DIGITS, TEXT = Path("compare", "pecker-seed0"), Path("text")
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
NETWORK = ["--pretrained_model_name_or_path", "network"]
OPTIONS = {"max_train_steps": 4, "train_batch_size": 4, "forget_batch_size": 2, "saliency_batch_size": 4}
OPTIONS |= {"saliency_batches": 1, "mask_refresh_steps": 2}
STEPS = ["--checkpointing_steps", "2", "--checkpoints_total_limit", "9", "--logging_steps", "1", "--no-progress_bar"]
COMMANDS = {
    DIGITS: [
        "unlearn", "--method", "pecker", *NETWORK, "--output_dir", str(DIGITS), "--samples_per_class", "3",
        "--validation_steps", "2", "--device", "cpu", *STEPS,
        *(word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))),
    ],
    TEXT: [
        "unlearn", "--preset", "sd15-celebrity", "--method", "pecker", "--pretrained_model_name_or_path", "model",
        "--output_dir", str(TEXT), "--concept", "Brad Pitt", "--cover", "a middle aged man", "--device", "cpu",
        "--retain_prompts", "retain.txt", "--forget_prompts", "forget.txt", "--sample_prompts", "forget.txt",
        "--max_train_steps", "4", "--sample_steps", "1", "--samples_per_prompt", "1", "--saliency_batches", "1",
        "--mask_refresh_steps", "2", "--gradient_accumulation_steps", "1", "--teacher_dtype", "float32", *STEPS,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).with_name("fixtures") / "old_runs.tar.xz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


@pytest.fixture
def old(unpacked, tmp_path, monkeypatch) -> Path:
    """The original runs in another folder; the present folder is a copy of them."""
    shutil.copytree(unpacked, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return unpacked


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def computes_alike(old: Path) -> bool:
    """Whether this machine rounds like the one that made the runs, judging by CPU and torch."""
    here, recorded = environment(), read(old / DIGITS / "environment.json")
    return all(here[key] == recorded[key] for key in ("cpu", "cpu_instruction_set")) and (
        here["packages"]["torch"] == recorded["packages"]["torch"]
    )


def assert_figures(now: dict, before: dict, exactly: bool) -> None:
    """Has the figures of earlier code with their values. Other rounding may move an accuracy by one sample of 3."""
    for key, value in before.items():
        if isinstance(value, float) and "seconds" not in key and "memory" not in key:
            sample = 100 / 3 if key in ("ua", "retain_accuracy", "extractor_precision", "extractor_recall") else 0.0
            assert now[key] == (value if exactly else pytest.approx(value, rel=0.02, abs=sample)), key


@pytest.mark.parametrize("run", [DIGITS, Path("compare", "sfd-seed0"), TEXT], ids=str)
def test_reports(old, capsys, run):
    main(["report", str(run)])
    printed = capsys.readouterr().out
    assert str(run / "report.html") in printed and "changed since" not in printed
    page = check_page((run / "report.html").read_text())
    assert read(run / "hashes.json")["config.json"]["sha256"] in page.text
    assert (run / "report.md").read_text().startswith((old / run / "report.md").read_text().splitlines()[0])
    # The run's own figures are unchanged.
    assert (run / "metrics.json").read_bytes() == (old / run / "metrics.json").read_bytes()
    (run / "train.jsonl").write_text("{}\n")
    main(["report", str(run)])
    assert "changed since the run ended: train.jsonl" in capsys.readouterr().out


def test_evaluation(old, capsys):
    """Measures the existing samples and draws none."""
    (chunk,) = (DIGITS / "evaluation").rglob("chunk-*")
    written = chunk.stat().st_mtime_ns
    (DIGITS / "evaluation.json").unlink()
    main(["evaluate", str(DIGITS), "--samples-per-class", "3", "--no-progress-bar"])
    capsys.readouterr()
    assert [chunk] == [*(DIGITS / "evaluation").rglob("chunk-*")] and chunk.stat().st_mtime_ns == written
    now, before = (read(folder / DIGITS / "evaluation.json") for folder in (Path(), old))
    assert_figures(now, before, computes_alike(old))
    assert now["protocol"]["samples"] == before["protocol"]["samples"]


@pytest.mark.parametrize("run", [DIGITS, TEXT], ids=str)
def test_resumption(old, capsys, run):
    """From the checkpoint of earlier code, to the same end."""
    exactly = computes_alike(old)
    main([*COMMANDS[run], "--resume_from_checkpoint", "checkpoint-2"])
    capsys.readouterr()
    now, before = (load_file(folder / run / WEIGHTS) for folder in (Path(), old))
    start = load_file(run / "checkpoints" / "checkpoint-2" / WEIGHTS)
    rate = read(run / "config.json")["options"]["generator_learning_rate"]
    assert now.keys() == before.keys()
    for name, value in now.items():
        if exactly:
            assert same_bits(value, before[name]), name
        else:
            # If rounding changes the sign of a gradient, Adam's two steps go the other way.
            assert (value - before[name]).abs().max() <= 4 * rate, name
    assert any(not torch.equal(value, start[name]) for name, value in now.items())
    logs = [lines(folder / run / "train.jsonl") for folder in (Path(), old)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]] == [1, 2, 3, 4]
    for line, expected in zip(*logs, strict=True):
        assert {key for key in expected if key.startswith("loss")} == {key for key in line if key.startswith("loss")}
        assert_figures(line, expected, exactly)
    metrics = read(old / run / "metrics.json")
    # Not those of the evaluation, which came after the run.
    later = metrics.get("protocol", {}).get("evaluation", {}).get("measured", [])
    assert_figures(read(run / "metrics.json"), {k: v for k, v in metrics.items() if k not in later}, exactly)
    assert (run / "checkpoints" / "checkpoint-4").is_dir()


def test_a_checkpoint_of_another_request_is_refused(old, capsys):
    command = [*COMMANDS[DIGITS], "--forget_classes", "2", "--resume_from_checkpoint", "checkpoint-2"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "is of another run" in capsys.readouterr().err


def test_comparison(old, capsys, tmp_path):
    """Reuses finished runs and makes none; also rebuilds the table from compare.json alone."""
    files = ["metrics.json", "config.json", "train.jsonl", str(WEIGHTS)]
    main(["compare", "--methods", "pecker", "sfd", "--seeds", "1", "--output-dir", "compare", "--device", "cpu",
          "--pretrained-model-name-or-path", "network", "--samples-per-class", "3", "--no-progress-bar",
          "--set", *(f"{name}={value}" for name, value in OPTIONS.items())])  # fmt: skip
    printed = capsys.readouterr().out
    assert "pecker" in printed and "sfd" in printed
    for run in (DIGITS, Path("compare", "sfd-seed0")):
        assert all((run / name).read_bytes() == (old / run / name).read_bytes() for name in files)
    main(["compare", "--runs", str(old / "compare" / "compare.json"), "--output-dir", str(tmp_path / "table")])
    before, *tables = (
        list(csv.DictReader(path.read_text().splitlines()))
        for path in (folder / "compare.csv" for folder in (old / "compare", Path("compare"), tmp_path / "table"))
    )
    assert [row["method"] for row in before] == ["pecker", "sfd"]
    for now in tables:
        assert len(now) == 2
        # The evaluation, which came after the comparison, has filled in more.
        for row, expected in zip(now, before, strict=True):
            filled = {key: value for key, value in expected.items() if value}
            assert {key: row[key] for key in filled} == filled
