"""The ablation: workers and studies share runs, an interrupted study resumes, reports, and wrong input."""

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pecker_fast.benchmarks.studies import ablate as command
from pecker_fast.benchmarks.studies.ablate import main
from pecker_fast.benchmarks.studies.conditions import NOTHING_FORGOTTEN, STUDIES

from pecker_fast.runs.task import unlearn_arguments

SETS = ["--set", "train_batch_size=2", "forget_batch_size=2", "saliency_batch_size=2"]


def arguments(folder: Path, *more: str, study: str = "mask", steps: int = 2) -> list[str]:
    small = ["--seeds", "1", "--max-train-steps", str(steps), "--samples-per-class", "3", "--output-dir", str(folder)]
    return ["--study", study, *small, *SETS, *more]


def fails(capsys, *arguments: str) -> str:
    """Runs the command, which must end with status 2 and one line, and returns that line."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def ran(monkeypatch):
    """Names of the runs that are made, in order."""
    real, names = command._run_one, []

    def watched(args):
        names.append(args.folder.name)
        real(args)

    monkeypatch.setattr(command, "_run_one", watched)
    return names


def test_workers_share_the_runs_and_the_last_one_reports(capsys, tmp_path, ran):
    some = ["--conditions", "sfd 0.1", "pecker", NOTHING_FORGOTTEN]
    main(arguments(tmp_path, *some, "--worker", "2/2"))
    assert ran == ["sfd-0.1-seed0"]
    assert "2 of 3 runs are left" in capsys.readouterr().out and not (tmp_path / "mask").exists()
    main(arguments(tmp_path, *some, "--worker", "1/2"))
    assert ran[1:] == ["pecker-seed0", "no-forgetting-seed0"]
    assert str(tmp_path / "mask" / "report.md") in capsys.readouterr().out
    # No run is made twice, not even in the other study.
    main(arguments(tmp_path, *some))
    main(arguments(tmp_path, "--conditions", "sfd 0.1", "--pairs", "0-1", study="plus"))
    assert len(ran) == 3 and (tmp_path / "plus" / "report.md").is_file()
    lines = [json.loads(line) for line in (tmp_path / "mask" / "runs.jsonl").read_text().splitlines()]
    assert [line["condition"] for line in lines] == ["pecker", "sfd 0.1", NOTHING_FORGOTTEN]
    folder = tmp_path / "0-1"
    figures = {line["condition"]: line["figures"] for line in lines}
    # Drift is measured against the run without forgetting on the same noise.
    images = {
        name: safetensors.torch.load_file(folder / f"{name}-seed0" / "retained.safetensors")["images"].double()
        for name in ("pecker", "no-forgetting")
    }
    drift = (images["pecker"] - images["no-forgetting"]).square().mean().sqrt().item()
    assert figures["pecker"]["drift"] == pytest.approx(drift, rel=1e-3) and drift > 0
    assert figures[NOTHING_FORGOTTEN]["drift"] == 0 and images["pecker"].shape == (27, 1, 8, 8)
    assert 0 < figures["pecker"]["parameter_change"] < 10
    files = {path.name for path in (folder / "pecker-seed0").iterdir()}
    assert not files & {"checkpoints", "unet", "report.md"}
    # The file of runs alone gives the same report.
    other, several = tmp_path / "other", tmp_path / "several.jsonl"
    several.write_text((tmp_path / "plus" / "runs.jsonl").read_text() + "\n".join(json.dumps(x) for x in lines[::-2]))
    main(["--runs", str(tmp_path / "mask" / "runs.jsonl"), "--output-dir", str(other)])
    assert (other / "mask" / "runs.csv").read_bytes() == (tmp_path / "mask" / "runs.csv").read_bytes()
    # Other runs in it, and their order, do not matter.
    main(["--runs", str(several), "--output-dir", str(other)])
    assert [run["factor"] for run in map(json.loads, (other / "mask" / "runs.jsonl").open())] == [
        line["factor"] for line in lines
    ]


def test_study_resumes_and_refuses_other_runs(capsys, tmp_path, ran, monkeypatch):
    some = ["--conditions", "pecker", "sfd 0.1"]
    watched = command._run_one

    def interrupted(args):
        if ran:
            raise SystemExit(143)
        watched(args)

    monkeypatch.setattr(command, "_run_one", interrupted)
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, *some))
    capsys.readouterr()
    main(arguments(tmp_path, *some, "--report-only"))
    assert "1 of 2 runs are missing" in capsys.readouterr().out
    monkeypatch.setattr(command, "_run_one", watched)
    main(arguments(tmp_path, *some))
    assert ran == ["pecker-seed0", "sfd-0.1-seed0"]
    capsys.readouterr()
    assert "another options" in fails(capsys, *arguments(tmp_path, *some, steps=3))


def test_partial_evaluations_measure_the_same_ua(tmp_path):
    planned = command._plan(
        STUDIES["mask"], "digits", range(1), ((0, 1),), ("sfd 0.5",), tmp_path, {"max_train_steps": 3}, 4
    )
    (run,) = planned
    compute = run.args.compute.resolved()
    setting = command.ClassTask(run.args, compute, command.World()).setting
    method = command.method_class("sfd")(setting, run.args.options)
    evaluation = command.SparseEvaluation(setting, method, command.evaluator_of("digits", 8, (0,), 1), 4)
    phase = method.phases[0]
    phase.start(None)
    # As if half forgotten: some of the noise gives another class.
    with torch.no_grad():
        for param in method.generator.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
    with phase.averaged() as network:
        quick, full = evaluation(network, 2), evaluation(network, phase.iterations)
    assert set(quick) == {"ua"} and quick["ua"] == full["ua"] and full["frechet_distance"] > 0


def test_studies_are_consistent():
    for study in STUDIES.values():
        for pair in study.pairs:
            names = [condition.name for condition in study.of_pair(pair)]
            assert len({*names}) == len(names) and study.default in names and NOTHING_FORGOTTEN in names
            assert all(condition.factor for condition in study.of_pair(pair))
        assert set(study.frontier) & {condition.name for condition in study.conditions}
        several = command._plan(study, "digits", range(5), study.pairs, None, Path("x"), {}, 10)
        plan = list(several)
        assert len({run.args.folder for run in plan}) == len(plan) <= 250
        for run in plan:
            run.args.options.check()
            for name, value in run.condition.options.items():
                assert getattr(run.args.options, name) == value
    assert len(list(command._plan(STUDIES["mask"], "digits", range(5), ((0, 1),), None, Path("x"), {}, 10))) <= 150
    # One factor at a time: every condition differs from these defaults.
    base = unlearn_arguments("digits", "pecker").options
    assert (base.density, base.mask_refresh_steps, base.update, base.saliency_score) == (0.5, 10, "joint", "gradient")
    # A name means the same run in every study.
    named = {}
    for study in STUDIES.values():
        for condition in study.of_pair(study.pairs[0]):
            same = (condition.method, condition.options)
            assert named.setdefault(condition.name, same) == same


def test_wrong_inputs(capsys, tmp_path):
    folder = tmp_path / "a"
    assert "expected one of mask, plus" in fails(capsys, *arguments(folder, study="masks"))
    assert "expected I/N" in fails(capsys, *arguments(folder, "--worker", "3/2"))
    assert "expected I/N" in fails(capsys, *arguments(folder, "--worker", "1"))
    assert "such as 0-1" in fails(capsys, *arguments(folder, "--pairs", "01"))
    assert "'sfd'" in fails(capsys, *arguments(folder, "--conditions", "sfd"))
    assert "comes without a judge" in fails(capsys, *arguments(folder, "--preset", "cifar10"))
    assert "seeds is 0" in fails(capsys, *arguments(folder, "--seeds", "0"))
    assert "no run of this study" in fails(capsys, *arguments(folder, "--report-only"))
    assert "option of none" in fails(capsys, *arguments(folder), "densty=0.1")
    assert "expected a file of runs" in fails(capsys, *arguments(folder, "--runs", str(tmp_path / "none")))
    assert "of the pair" in fails(
        capsys, *arguments(folder, "--pairs", "3-8", "--conditions", "pecker+ density 0.1", study="plus")
    )
    assert not folder.exists()


def test_report_command_has_no_absolute_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command.__file__, "--study", "plus", "--output-dir", str(tmp_path / "a b")])
    assert command._command("plus") == f"{command.PROGRAM} --study plus --output-dir 'a b'"
    # The arguments of another program are not the study's.
    monkeypatch.setattr(sys, "argv", ["pytest", "-q"])
    assert command._command("mask") == f"{command.PROGRAM} --study mask"
