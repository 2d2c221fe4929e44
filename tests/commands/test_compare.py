"""compare: interruption, resumption, and wrong input."""

import csv
import hashlib
import json
from pathlib import Path

import pytest

from pecker_fast.cli import main
from pecker_fast.runs import compare as command
from pecker_fast.runs.classes import comparison, evaluation
from pecker_fast.runs.classes.comparison import is_measured
from tests.commands.case import fails
from tests.report.test_render import check_page

SMALL = ["--max-train-steps", "4", "--samples-per-class", "3", "--no-progress-bar"]
SETS = ["--set", "train_batch_size=3", "forget_batch_size=2", "saliency_batch_size=2"]


def test_compare_resumes_after_interruption(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    arguments = ["compare", "--methods", "pecker,sfd", "--seeds", "2", "--output-dir", str(folder), *SMALL, *SETS]
    real, ran = command.unlearn, []

    def watched(args, before=None):
        ran.append((args.method, args.compute.seed))
        if len(ran) == 3:
            raise SystemExit(143)
        return real(args, before)

    monkeypatch.setattr(command, "unlearn", watched)
    with pytest.raises(SystemExit):
        main(arguments)
    assert ran == [("pecker", 0), ("sfd", 0), ("pecker", 1)]
    assert "the same command again" in capsys.readouterr().out
    first = (folder / "pecker-seed0" / "metrics.json").read_bytes()
    main(arguments)
    assert ran[3:] == [("pecker", 1), ("sfd", 1)]
    assert (folder / "pecker-seed0" / "metrics.json").read_bytes() == first
    metrics, report = json.loads(first), (folder / "pecker-seed0" / "report.md").read_text()
    assert [row["role"] for row in metrics["by_class"]["classes"]] == ["forgotten", "cover", *["retained"] * 8]
    shares = metrics["by_class"]["drawn_as"][0]["shares"]
    assert sum(shares.values()) == pytest.approx(100) and 100 - shares["0"] == pytest.approx(metrics["ua"])
    assert metrics["pul"] == pytest.approx(100 - 100 * metrics["forgotten_share"] / metrics["before_forgotten_share"])
    assert "What a forgotten class is drawn as now" in report and "| Percentage of unlearning (PUL) |" in report
    output = capsys.readouterr().out
    assert "pecker" in output and "±" in output and str(folder / "report.md") in output
    compared = json.loads((folder / "compare.json").read_text())["methods"]
    assert [len(compared[name]) for name in ("pecker", "sfd")] == [2, 2]
    assert [run["seed"] for run in compared["sfd"]] == [0, 1]
    options = json.loads((folder / "pecker-seed1" / "config.json").read_text())["options"]
    assert (options["max_train_steps"], options["train_batch_size"], options["saliency_batch_size"]) == (4, 3, 2)
    assert not (folder / "sfd-seed1" / "checkpoints").exists()
    # The report is rebuilt from the JSON alone, in another folder and without seconds.
    main(["compare", "--runs", str(folder / "compare.json"), "--output-dir", str(tmp_path / "d"), "--no-seconds"])
    output = capsys.readouterr().out
    assert "pecker" in output and "time (s)" not in output and str(tmp_path / "d" / "report.md") in output
    assert (tmp_path / "d" / "compare.csv").read_bytes() == (folder / "compare.csv").read_bytes()
    assert len(ran) == 5
    # Not beside the file unless asked, and without options that would not be used.
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    runs = ["--runs", str(folder / "compare.json")]
    assert f"pecker-fast report {folder} writes the report" in fails(capsys, "compare", *runs, "--no-seconds")
    error = fails(capsys, "compare", *runs, "--output_dir", str(tmp_path / "e"), "--seeds", "2")
    assert "seeds is 2, but runs" in error and not (tmp_path / "e").exists()
    # Other methods or fewer seeds do not replace a report.
    for words in (["--methods", "pecker,sfd"], ["--methods", "pecker", "patch", "--seeds", "2"]):
        error = fails(capsys, "compare", *words, *arguments[5:], *(["--seeds", "1"] if len(words) == 2 else []))
        assert "has the report of a comparison with" in error and "sfd" in error
    assert {path: path.read_bytes() for path in before} == before and len(ran) == 5
    # The report of the folder is written again, with what the runs have measured since.
    metrics = json.loads((folder / "sfd-seed1" / "metrics.json").read_text())
    (folder / "sfd-seed1" / "metrics.json").write_text(json.dumps({**metrics, "fid": 12.5}))
    (folder / "report.md").unlink()
    main(["report", str(folder)])
    assert str(folder / "report.md") in capsys.readouterr().out
    text = (folder / "report.md").read_text()
    assert "# Methods compared" in text and "config.json is missing" not in text and "12.50 (1 of 2)" in text
    compared = json.loads((folder / "compare.json").read_text())
    assert compared["command"] == json.loads(before[folder / "compare.json"])["command"]
    assert {name: [run["seed"] for run in several] for name, several in compared["methods"].items()} == {
        "pecker": [0, 1],
        "sfd": [0, 1],
    }
    # Finished runs are reused, but not for another question.
    main(arguments)
    assert len(ran) == 5
    capsys.readouterr()
    error = fails(capsys, *arguments, "density=0.1")
    assert "another options" in error and "pecker-seed0" in error


def test_runs_are_measured_with_inception(capsys, tmp_path, monkeypatch):
    folder, weights = tmp_path / "c", tmp_path / "inception.pth"
    weights.write_bytes(b"weights")
    arguments = ["compare", "--methods", "sfd", "--seeds", "2", "--output-dir", str(folder), *SMALL, *SETS[:3]]
    main(arguments)
    calls = []

    def measured(generated, real, *, weights, cache, everything, **_options):
        calls.append((len(generated), cache))
        assert len(everything) == 40
        protocol = {"weights_sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest()}
        values = {"fid": 10.0 + len(calls), "sfid": 5.0, "is": 2.0, "kid": 0.1, "precision": 0.5, "recall": 0.25}
        return {**values, "protocol": protocol}

    monkeypatch.setattr(evaluation, "image_quality", measured)
    for module in (evaluation, comparison):
        monkeypatch.setattr(module, "check_inception_weights", Path)
    arguments += ["--inception-weights", str(weights), "--final-samples-per-class", "4"]
    main(arguments)
    # Of nine retained classes; the runs share the features of the real images.
    assert calls == [(36, folder / "features")] * 2
    text = (folder / "report.md").read_text()
    for title in ("UA (%)", "FID", "sFID", "IS", "KID", "precision", "recall", "data-free", "time (s)", "images",
                  "memory (GiB)", "reached (%)", "changed (%)", "drift"):  # fmt: skip
        assert f" {title} |" in text, title
    assert "11.50 ± 0.71" in text
    with open(folder / "compare.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["fid"]) for line in lines] == [11, 12] and {line["data-free"] for line in lines} == {"yes"}
    check_page((folder / "report.html").read_text())
    assert "| FID | 11.00 |" in (folder / "sfd-seed0" / "report.md").read_text()
    # Measured only once; other weights or other counts would be measured again.
    main(arguments)
    assert len(calls) == 2
    sha256 = hashlib.sha256(b"weights").hexdigest()
    assert is_measured(folder / "sfd-seed1", sha256, 4)
    assert not is_measured(folder / "sfd-seed1", sha256, 5)
    assert not is_measured(folder / "sfd-seed1", hashlib.sha256(b"others").hexdigest(), 4)
    capsys.readouterr()


def test_wrong_inputs(capsys, tmp_path):
    out = ["--output-dir", str(tmp_path / "c"), *SMALL]
    assert "each method once" in fails(capsys, "compare", "--methods", "sfd,sfd", *out)
    assert "pecker, pecker+" in fails(capsys, "compare", "--methods", "sdf", *out)
    assert "seeds is 0" in fails(capsys, "compare", "--seeds", "0", *out)
    assert "name=value" in fails(capsys, "compare", *out, "--set", "density")
    assert "option of none" in fails(capsys, "compare", *out, "--set", "densty=0.1")
    assert "density" in fails(capsys, "compare", *out, "--set", "density=7")
    assert "preset is 'mnistt'" in fails(capsys, "compare", "--preset", "mnistt", *out)
    assert "compare.json of a comparison" in fails(capsys, "compare", "--runs", str(tmp_path / "none.json"), *out)
    assert "no such file" in fails(capsys, "compare", *out, "--inception-weights", str(tmp_path / "nowhere"))
    assert "inception_weights" in fails(capsys, "compare", *out, "--final-samples-per-class", "9")
    assert not (tmp_path / "c").exists()
