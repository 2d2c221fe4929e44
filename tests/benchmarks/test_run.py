"""The benchmarks themselves, on networks so small that their times mean nothing."""

import json

import pytest
import torch
from pecker_fast.benchmarks.inputs import Problem
from pecker_fast.benchmarks.registry import OPS, OURS, Figure, adam_floor

from pecker_fast.benchmarks import gpu_figures, plots, registry, report, run

TINY = Problem("tiny")
QUICK = {"sizes": ("tiny",), "threads": (1,), "repeats": 2, "max_seconds": 0.05}


@pytest.mark.slow
def test_all_cpu_operations_run(tmp_path, monkeypatch):
    # The tests of the command measure it, in a process for each figure.
    monkeypatch.setattr(registry, "extra_memory_share", lambda problem, name: 0.5)
    results = run.run(**QUICK)
    assert {row["op"] for row in results["rows"]} == {name for name, op in OPS.items() if "cpu" in op.devices}
    for row in results["rows"]:
        assert row["number"] > 0
        for name, speed in row.get("floor_gb_per_s", {}).items():
            moved = row["floor_bytes"][name] * row["numel"]
            assert speed == pytest.approx(moved / row["seconds"][name]["p50"] / 1e9)
    path = tmp_path / "results.json"
    run.save(results, path)
    assert run.load(path) == json.loads(path.read_text())
    assert report.text_table(results["rows"]).count("\n") == len(results["rows"]) + 1
    assert "MaskedAdam.step() / torch fused" in report.markdown(results)


def test_share_of_copy_bandwidth():
    case = OPS["share_beta0"].build(TINY)
    (figure,) = case.figures
    row = run.measure(case, figure, TINY, 3, 1.0)
    moved = adam_floor(TINY, 1) * TINY.numel
    assert row["copy_gb_per_s"] > 0 and figure.bar is None and not figure.at_most
    assert row["number"] == pytest.approx(moved / row["seconds"][OURS]["p50"] / 1e9 / row["copy_gb_per_s"])
    read = run.measure(case, Figure("over a read", against_copy="read"), TINY, 3, 1.0)
    ideal = 4 * TINY.numel / (1e9 * read["copy_gb_per_s"])
    assert read["number"] == pytest.approx(read["seconds"][OURS]["p50"] / ideal)


@pytest.mark.parametrize(
    "name", [name for name in OPS if name.startswith(("share_", "masked_speedup", "joint_rivals"))]
)
def test_gpu_operations_run(name):
    case = OPS[name].build(TINY)
    for function in case.functions.values():
        function()
    assert {f.numerator for f in case.figures} | {f.denominator for f in case.figures} <= {*case.functions, OURS}
    assert all(0 < floor < 64 for floor in case.floors.values())


def test_every_operation_on_one_back_end():
    for function in gpu_figures._on_backend(TINY, "reference").values():
        function()


def test_joint_rival_does_the_same_work():
    case = OPS["joint_rivals"].build(TINY)
    ours, rival = case.functions[OURS], case.functions["separate passes"]
    params = [[p.detach().clone() for p in _params(step)] for step in (ours, rival)]
    assert all(torch.equal(a, b) for a, b in zip(*params, strict=True))
    ours(), rival()
    for before, a, b in zip(params[0], _params(ours), _params(rival), strict=True):
        assert (a != before).any()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def _params(step) -> list[torch.Tensor]:
    """The parameters that a step of the case moves."""
    if hasattr(step, "func"):
        return step.func.__self__.param_groups[0]["params"]
    return next(cell.cell_contents for cell in step.__closure__ if _are_parameters(cell.cell_contents))


def _are_parameters(value) -> bool:
    return isinstance(value, list) and isinstance(value[0], torch.nn.Parameter)


def test_roofline(tmp_path):
    results = run.run(["masked_adam", "share_plain"] if torch.cuda.is_available() else ["masked_adam"], **QUICK)
    points = plots.points(results)
    assert {p["name"] for p in points} >= {OURS, "torch fused"} and [p["ours"] for p in points] == [True, False]
    ours = next(p for p in points if p["ours"])
    row = results["rows"][0]
    assert ours["picoseconds"] == pytest.approx(1e12 * row["seconds"][OURS]["p50"] / row["numel"])
    run.save(results, tmp_path / "results.json")
    assert plots.main([str(tmp_path / "results.json"), str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    results["rows"] = [{**row, "copy_gb_per_s": 20.0}]
    assert plots.copy_speed(results) == 20.0
    plots.draw_roofline(results, tmp_path / "plot.png")


def test_wrong_inputs(tmp_path, capsys):
    with pytest.raises(ValueError, match="'launches', which runs on cuda only"):
        run.run(["launches"], **QUICK)
    with pytest.raises(ValueError, match="operation is 'none'"):
        run.run(["none"])
    with pytest.raises(ValueError, match="no floors"):
        plots.draw_roofline({"rows": [], "conditions": {}}, tmp_path / "plot.png")
    (tmp_path / "no.json").write_text("{}")
    assert plots.main([str(tmp_path / "no.json"), str(tmp_path / "plot.png")]) == 2
    assert "not a result file" in capsys.readouterr().err and not (tmp_path / "plot.png").exists()
