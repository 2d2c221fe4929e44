"""The study of destroying before forgetting: its plan, runs that resume, and its report."""

import json

import pytest
from pecker_fast.benchmarks.studies import destroy, patch_relearn, patch_runs
from pecker_fast.benchmarks.studies.destroy import CONDITIONS, FIRST, PLACES, main, plan
from pecker_fast.benchmarks.studies.patch_conditions import NEVER_SAW, PATCH, RELABEL

from pecker_fast.runs.presets import method_options
from pecker_fast.unlearning import method_class

SOME = ["relabel", PATCH, "patch, relabelled", "patch, noise 0.05 x 1"]


def test_plan():
    jobs = list(plan())
    assert len({job.key for job in jobs}) == len(jobs) and {(job.preset, job.pair) for job in jobs} == set(PLACES)
    names = [condition.name for condition in CONDITIONS]
    assert len({*names}) == len(names) and names[:3] == [RELABEL, PATCH, "patch, relabelled"]
    assert NEVER_SAW in names and len(CONDITIONS) == 55
    assert [job.seed for job in jobs if job.preset == "mnist"][: 5 * len(FIRST)] == [s for s in range(5) for _ in FIRST]
    for condition in CONDITIONS:
        if condition.group != "control":
            options = method_options("digits", method_class(condition.method))
            patch_runs.replace(options, **{**patch_runs.COMMON, **condition.options}).check()


def test_study_resumes_and_reports(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(destroy, "STEPS", {"inversion": (1,), "denoising": (1, 2)})
    monkeypatch.setattr(patch_relearn, "SAMPLES", (3, 1))
    words = [*small, "--seeds", "0", "--conditions", *SOME]
    main([*words, "--limit", "2"])
    path = tmp_path / "results" / "digits-0-1.jsonl"
    before = path.read_text()
    main([*words, "--plan"])
    assert capsys.readouterr().out.splitlines()[-1] == "2 runs"
    main(words)
    assert path.read_text().startswith(before)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["condition"] for record in records] == SOME
    assert {*records[0]["steps"]} == {"inversion", "denoising", "denoising, DDIM, 10 steps"}
    # Two iterations cannot repair what was destroyed.
    distances = {record["condition"]: record["figures"]["frechet_distance"] for record in records}
    assert distances["patch, noise 0.05 x 1"] > 1.2 * distances[PATCH]
    report = (tmp_path / "results" / "report.md").read_text()
    assert all(name in report.replace("\\", "") for name in SOME) and "relabel" in report
    records[1]["options"] = {"density": 0.2}
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    main([*words, "--summary"])
    assert "with other options" in fails_of(capsys, words)


def fails_of(capsys, words: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("destroy: ")
    return line


def test_bounds_and_ratios(tmp_path):
    def record(condition: str, seed: int, inversion: float | None, matching: float | None) -> dict:
        figures = {"ua": 99.0, "retain_accuracy": 98.0, "frechet_distance": 0.5, "cover_frechet_distance": 8.0}
        curves = {"inversion": {"0": 100, "50": 40}, "matching": {"0": 100, "20": 30}}
        steps = {"inversion": inversion, "matching": matching}
        place = {"preset": "digits", "pair": "0-1", "condition": condition, "seed": seed}
        return {**place, "figures": figures, "steps": steps, "ua": curves}

    records = [record(RELABEL, seed, 10.0 + seed, 5.0) for seed in range(2)]
    records += [record(PATCH, seed, None, 10.0 + seed) for seed in range(2)]
    report = destroy.write_summary(tmp_path, records).read_text()
    row, relative = (line for line in report.splitlines() if PATCH in line)
    # Both seeds resist inversion to its end, relabel for 10 and 11 steps; matching takes 2 and 2.2 times
    # relabel's steps.
    assert "≥ 50" in row and "≥ 4.77 (" in relative and relative.count("2.10 (") == 2
    with pytest.raises(ValueError, match="has no runs"):
        destroy.write_summary(tmp_path, [])
