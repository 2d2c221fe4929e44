"""The study of patches: its plan, runs that resume, adapters, attacks, and its report."""

import json

import pytest
import torch
from pecker_fast.benchmarks.studies import patch as command
from pecker_fast.benchmarks.studies import patch_relearn, patch_runs
from pecker_fast.benchmarks.studies.patch import main
from pecker_fast.benchmarks.studies.patch_conditions import (
    CONDITIONS,
    CORE,
    ESTIMATES,
    PATCH,
    PLACES,
    RELEARN,
    Job,
    plan,
)
from pecker_fast.benchmarks.studies.patch_report import best_dense, results_by_place

from pecker_fast.models import resolve
from pecker_fast.runs.presets import method_options
from pecker_fast.unlearning import ForgetRequest, method_class
from pecker_fast.unlearning.relabel import relabelled
from tests.inputs import same_bits


def fails(capsys, *arguments: str) -> str:
    """Runs the command, which must end with status 2 and one line, and returns that line."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_plan_starts_with_the_most_valuable_runs():
    jobs = list(plan())
    # The core at each place, how the ratio is estimated on the larger images too, and all the rest at the first place.
    expected = len(CONDITIONS) + (len(PLACES) - 1) * len(CORE) + len(ESTIMATES)
    assert len({job.key for job in jobs}) == len(jobs) == 5 * expected
    first = jobs[: len(CORE) * 5]
    assert {(job.preset, job.pair) for job in first} == {PLACES[0]} and {job.seed for job in first} == set(range(5))
    # Whole seeds, one after the other.
    assert [job.seed for job in first] == sorted(job.seed for job in first)
    assert jobs[-1].pair == (0, 1) and {(job.preset, job.pair) for job in jobs} == set(PLACES)
    names = [condition.name for condition in CONDITIONS]
    assert len({*names}) == len(names) and PATCH in names and {*RELEARN} <= {*names}
    for condition in CONDITIONS:
        for preset in ("digits", "digits16"):
            kind = patch_runs.LoraSFD if condition.method == "lora" else method_class(condition.method)
            options = method_options(preset, kind)
            patch_runs.replace(options, **{**patch_runs.COMMON, **condition.options}).check()


def test_study_resumes_and_reports(small, capsys, tmp_path):
    some = ["--conditions", PATCH, "no forgetting", "sfd 0.05/0.05 at 0.0006", "lora at 0.0024", "--seeds", "0", "1"]
    main([*small, *some, "--limit", "3"])
    assert "[3 of 3] digits 0 onto 1" in capsys.readouterr().out
    path = tmp_path / "results" / "digits-0-1.jsonl"
    before = path.read_text()
    main([*small, *some, "--plan"])
    assert capsys.readouterr().out.splitlines()[-1] == "5 runs"
    main([*small, *some])
    lines = path.read_text().splitlines()
    assert path.read_text().startswith(before) and len(lines) == 8
    records = [json.loads(line) for line in lines]
    by_name = {record["condition"]: record["figures"] for record in records if record["seed"] == 1}
    patch, dense, lora = by_name[PATCH], by_name["sfd 0.05/0.05 at 0.0006"], by_name["lora at 0.0024"]
    entries = sum(p.numel() for p in resolve(None, shipped="digits").network.parameters())
    assert patch["changed"] == pytest.approx(10, abs=0.01) and dense["changed"] > 99
    # An average and a second moment of a tenth of the weights, and the mask.
    assert dense["state_bytes"] == pytest.approx(8 * entries, rel=1e-3)
    assert patch["state_bytes"] == pytest.approx((0.8 + 1 / 8) * entries, rel=1e-2)
    assert dense["gradient_bytes"] == 4 * entries
    assert patch["gradient_bytes"] == pytest.approx(0.4 * entries, rel=2e-2)
    assert (
        dense["patch_bytes"] == pytest.approx(4 * entries, rel=1e-3)
        and patch["patch_bytes"] < 0.12 * dense["patch_bytes"]
    )
    assert 0.8 < lora["patch_bytes"] / patch["patch_bytes"] < 1.2
    assert all(figures["iteration_seconds"] > 0 for figures in by_name.values())
    assert all(figures["images_to_forget"] is None for figures in by_name.values())
    report = (tmp_path / "results" / "report.md").read_text()
    assert f"{PATCH} minus" not in report and "≥ 4" in report and (tmp_path / "results" / "front.png").is_file()
    # Records with other options are another study.
    records[0]["options"] = {"density": 0.3, **records[0]["options"]}
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    assert "with other options" in fails(capsys, *small, *some)
    assert "places has 'digits:1-0'" in fails(capsys, "--places", "digits:1-0")
    assert "conditions has 'sfd'" in fails(capsys, *small, "--conditions", "sfd")
    assert "workers is 0" in fails(capsys, "--workers", "0")
    assert "no runs" in fails(capsys, "--summary", "--results", str(tmp_path / "none"))


def test_claims_are_paired_differences(tmp_path):
    def record(condition: str, seed: int, images: int | None, cost: float) -> dict:
        figures = {"images_to_forget": images, "frechet_distance": cost}
        return {
            "preset": "digits",
            "pair": "0-1",
            "condition": condition,
            "seed": seed,
            "group": "dense",
            "images": 1920,
            "figures": figures,
            "generator_sha256": "0123",
        }

    slow, fast, never = "sfd 0.3/0.02 at 0.00015", "pecker+ 0.3/0.02 at 0.0003", "sfd 0.05/0.05 at 0.0006"
    records = [record(slow, seed, 1400 + seed, 0.5) for seed in range(3)]
    records += [record(fast, seed, 1000, 0.4 + 0.1 * seed) for seed in range(3)]
    records += [record(never, seed, None, 0.1) for seed in range(3)]
    records += [record(PATCH, seed, 900, 0.3 + 0.1 * seed) for seed in range(3)]
    (of,) = results_by_place(records).values()
    assert best_dense(of) == fast
    report = command.write_summary(tmp_path, records).read_text()
    row = next(line.replace("\\", "") for line in report.splitlines() if f"{PATCH} minus {fast}" in line)
    with pytest.raises(ValueError, match="two generators, 0123 and 4567"):
        results_by_place([*records, {**records[0], "generator_sha256": "4567"}])
    assert "-10 (-10 to -10) *" in row and "-100 (-100 to -100) *" in row and "-0.10 (-0.10 to -0.10) *" in row
    # All pairs together: each pair has its own best dense setting.
    swapped = {slow: fast, fast: slow}
    other = [{**x, "pair": "3-8", "condition": swapped.get(x["condition"], x["condition"])} for x in records]
    report = command.write_summary(tmp_path, [*records, *other]).read_text()
    row = next(line.replace("\\", "") for line in report.splitlines() if "all pairs" in line and "dense" in line)
    assert "| 6 | -10 (-10 to -10) * |" in row and "-0.10 (-0.10 to -0.10) *" in row


def test_attacks_and_controls(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(patch_relearn, "STEPS", {"inversion": (1,), "denoising": (1, 2)})
    monkeypatch.setattr(patch_relearn, "SAMPLES", (3, 1))
    main([*small, "--relearn", "--conditions", "relabel", PATCH, "--seeds", "0"])
    records = [
        json.loads(line) for line in (tmp_path / "results" / "relearn-digits-0-1.jsonl").read_text().splitlines()
    ]
    assert [record["condition"] for record in records] == ["relabel", PATCH]
    assert {*records[0]["ua"]} == {"inversion", "denoising", "denoising, DDIM, 10 steps"}
    assert "Relearning" in (tmp_path / "results" / "report.md").read_text()
    start = resolve(None, shipped="digits").network
    labels, z = torch.tensor([0, 1]), torch.randn(1, 1, 8, 8).repeat(2, 1, 1, 1)
    copied = relabelled(start, ForgetRequest.of(start, [0], 1), 0).eval()
    with torch.no_grad():
        one, two = copied(z, torch.tensor([100, 100]), class_labels=labels).sample
    assert torch.equal(one, two)


def test_adapters_are_merged_into_the_weights(small, tmp_path):
    condition = next(condition for condition in CONDITIONS if condition.method == "lora")
    method = patch_runs.method_of(Job("digits", (0, 1), condition, 0), tmp_path)
    start = method.setting.problem.initial_generator
    assert all(same_bits(a, b) for a, b in zip(method.merged().parameters(), start.parameters(), strict=True))
    patch_runs.train(method)
    labels, z, t = torch.tensor([0, 1]), torch.randn(2, 1, 8, 8), torch.tensor([100, 200])
    merged = method.merged().eval()
    with torch.no_grad():
        expected = method.generator.eval()(z, t, class_labels=labels).sample
        actual = merged(z, t, class_labels=labels).sample
    assert torch.allclose(actual, expected, atol=1e-5) and not torch.equal(merged.conv_in.weight, start.conv_in.weight)
