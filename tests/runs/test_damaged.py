"""Runs whose files are damaged: one line that names the file, the key and the fix, from every reader."""

import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest

from pecker_fast.records import RecordError
from pecker_fast.report.files import RunRecord
from pecker_fast.report.run_report import sections
from pecker_fast.runs.audit import changed_files
from pecker_fast.runs.run import Run
from tests.commands.case import fails
from tests.test_locks import Holder

pytest.importorskip("sklearn")
ARCHIVE = Path(__file__).parents[1] / "fixtures" / "old_runs.tar.xz"
RUNS = (Path("compare", "pecker-seed0"), Path("text"))
FILES = (
    "config.json",
    "metrics.json",
    "drift.json",
    "hashes.json",
    "environment.json",
    "train.jsonl",
    "evaluation.jsonl",
)
VALUES = (None, True, -1, 0, 1.5, 2**62, "x", "0" * 64, [], [1], {}, {"a": 1})


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


@pytest.fixture
def old(unpacked, tmp_path, monkeypatch) -> Path:
    shutil.copytree(unpacked, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return unpacked


def read(folder: Path) -> None:
    """What a report and a program read of a run."""
    record = RunRecord.read(folder)
    assert sections(record) and record.figures
    changed_files(folder)
    run = Run(folder)
    assert run.config and run.metrics and run.log is not None and run.evaluations is not None
    assert run.mask is not None


def places(value, place=()):
    """The place of every value inside a JSON value."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


def replaced(value, place, new):
    value = json.loads(json.dumps(value))
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return value


@pytest.mark.parametrize("folder", RUNS, ids=str)
def test_replaced_values_give_a_report_or_one_line(old, folder):
    refused = 0
    for name in FILES:
        path = folder / name
        original = path.read_text()
        lines = [json.loads(line) for line in original.splitlines()] if name.endswith("l") else [json.loads(original)]
        if not lines:
            continue
        for _ in range(25):
            number = random.randrange(len(lines))
            place = random.choice([*places(lines[number])])
            new = random.choice(VALUES)
            changed = [replaced(line, place, new) if i == number else line for i, line in enumerate(lines)]
            path.write_text("\n".join(map(json.dumps, changed)) + "\n")
            try:
                read(folder)
            except RecordError as error:
                refused += 1
                text = str(error)
                assert name in text and len(text.splitlines()) == 1 and len(text) < 400, text
            except Exception as error:
                raise AssertionError(f"{path}: {place} = {new!r}") from error
        path.write_text(original)
    assert refused > 10
    read(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '"x"', 'it is "x", expected an object'),
        ("config.json", '{"options": 5}', "options is 5, expected an object"),
        ("config.json", '{"options": {"t_init": 1e3}}', "options.t_init is 1000.0, expected an integer"),
        ("config.json", '{"options": {}, "forget_classes": [9223372036854775808]}', "is beyond 64 bits"),
        ("config.json", '{"options": {}, "forget_classes": "0"}', 'forget_classes is "0", expected a list'),
        ("metrics.json", "[]", "it is [], expected an object"),
        ("metrics.json", '{"ua": "much"}', "ua is 'much', expected a number or null"),
        ("metrics.json", '{"weights_sha256": 5}', "weights_sha256 is 5, expected a sha256"),
        ("metrics.json", '{"protocol": {"evaluation": {"measured": [1]}}}', "protocol.evaluation.measured[0] is 1"),
        ("hashes.json", '{"config.json": {"bytes": 1}}', "sha256 is missing"),
        ("hashes.json", '{"../x": {"bytes": 1, "sha256": ""}}', "not in the folder"),
        (
            "drift.json",
            '{"total": {"parameters": 1, "drift": 1.0}, "modules": {}, "layers": {}}',
            "total.changed is missing",
        ),
        ("evaluation.jsonl", "5\n", "line 1, is damaged: it is 5, expected an object"),
        ("train.jsonl", '{"step": "1"}\n', 'step is "1"'),
        ("environment.json", '{"backends": 1}', "backends is 1"),
    ],
)
def test_report_names_the_file_the_key_and_the_fix(old, capsys, name, content, message):
    (RUNS[0] / name).write_text(content)
    line = fails(capsys, "report", str(RUNS[0]))
    assert f"{RUNS[0] / name}" in line and message in line and "; " in line, line


def test_other_commands(old, capsys):
    run = RUNS[0]
    (run / "config.json").write_text('{"options": {"t_init": "x"}, "forget_classes": [0]}')
    for command in ("evaluate", "robustness"):
        assert "options.t_init" in fails(capsys, command, str(run))
    shutil.copy(old / run / "config.json", run / "config.json")
    (run / "model_index.json").write_text('{"_class_name": "OneStepPipeline", "unet": "x"')
    with pytest.raises(RecordError, match=r"model_index\.json is damaged"):
        Run(run).pipeline  # noqa: B018
    for content, message in (
        ('{"_class_name": "StableDiffusionNonsense"}', "expected a pipeline"),
        ("{}", "is missing"),
    ):
        (run / "model_index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Run(run).pipeline  # noqa: B018


def test_a_second_writer_of_a_run_is_refused(old, capsys):
    """As two jobs that resume the same run do; the one that was first goes on undisturbed."""
    run = RUNS[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    temporary = run / "checkpoints" / ".checkpoint-4.tmp"
    process = Holder(run)
    temporary.mkdir()
    command = ["unlearn", "--method", "pecker", "--pretrained_model_name_or_path", "network", "--output_dir", str(run)]
    for options in (["--resume_from_checkpoint", "latest"], ["--overwrite_output_dir"]):
        line = fails(capsys, *command, *options, "--device", "cpu", "--no-progress_bar")
        assert f"output_dir {run.absolute()} is being written by process {process.pid} on" in line
    temporary.rmdir()
    process.kill()
    process.close()
    # Nothing has changed.
    (run / ".lock").unlink()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_paths_that_are_not_utf8_are_refused_before_anything_is_written(old, capsys):
    """Safetensors and reports could not be written there: a run would lose what it has trained."""
    name = os.fsdecode(b"run\xff")
    line = fails(
        capsys, "unlearn", "--pretrained_model_name_or_path", "network", "--output_dir", name, "--device", "cpu"
    )
    assert r"run\udcff" in line and "is not UTF-8: rename it" in line and not Path(name).exists()
