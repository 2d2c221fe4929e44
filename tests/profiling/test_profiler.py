"""The profiler: its sums, its traces, and no effect when it is off."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from pecker_fast.cli import main
from pecker_fast.profiling import GpuMeter, Profiler, Regions
from pecker_fast.profiling.profiler import TRACED, WAIT, WARMUP

LEFT_OUT = WAIT + WARMUP + TRACED


def work(regions: Regions) -> None:
    with regions("first"):
        time.sleep(0.003)
    with regions("second"):
        torch.randn(8, 8) @ torch.randn(8, 8)
    time.sleep(0.001)


def test_disabled_profiler_is_one_shared_object():
    regions = Regions()
    assert regions("a") is regions("b")
    with regions("a"), regions("b"):
        pass
    assert regions.totals() == {}


def test_regions_do_not_nest():
    regions = Regions(True)
    with pytest.raises(RuntimeError, match="'b' inside region 'a'"), regions("a"), regions("b"):
        pass
    with regions("b"):
        pass
    assert list(regions.totals()) == ["a", "b"]


def test_regions_add_up_to_the_iterations():
    regions = Regions(True)
    profiler = Profiler(regions, "cpu")
    profiler.start(8)
    profiler.resume()
    for i in range(8):
        work(regions)
        profiler.step(5)
        if i == 3:
            profiler.pause()
            with profiler.outside("evaluation"):
                time.sleep(0.2)
            profiler.resume()
    profiler.pause()
    summary = profiler.summary()
    inside = summary["seconds_by_region"]
    assert set(inside) == {"first", "second"} and inside["first"] >= 8 * 0.003
    # The time outside all regions is a sleep of 8 ms; it does not include the evaluation.
    assert summary["seconds"] - sum(inside.values()) >= 0.008
    assert summary["seconds_outside"]["evaluation"] >= 0.2
    assert summary["images_per_second"] == pytest.approx(40 / summary["seconds"])
    rows = {line.split()[0]: line.split() for line in profiler.table().splitlines()[1:5]}
    shares = {name: float(row[-1].rstrip("%")) for name, row in rows.items()}
    assert shares["iteration"] == 100.0
    assert shares["first"] + shares["second"] + shares["other"] == pytest.approx(100, abs=0.2)
    assert "evaluation" in profiler.table() and "no GPU" in profiler.table()


def test_lines_of_the_log_add_up_to_the_table():
    regions = Regions(True)
    profiler = Profiler(regions, "cpu")
    profiler.start(4)
    profiler.resume()
    lines = []
    for _ in range(4):
        work(regions)
        profiler.step(1)
        lines.append(profiler.record()["profile_seconds"])
    for name, seconds in profiler.summary()["seconds_by_region"].items():
        assert sum(line[name] for line in lines) == pytest.approx(seconds)


def test_traced_iterations_are_excluded_from_the_figures(tmp_path):
    regions = Regions(True)
    profiler = Profiler(regions, "cpu", tmp_path / "trace.json")
    count = 2 * LEFT_OUT + 1
    profiler.start(count)
    profiler.resume()
    for _ in range(count):
        work(regions)
        profiler.step(1)
    profiler.pause()
    profiler.close()
    assert profiler.summary()["iterations"] == count - LEFT_OUT
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "first" and event.get("cat") == "user_annotation" for event in events) == TRACED


def test_a_short_run_is_measured_and_not_traced(tmp_path):
    profiler = Profiler(Regions(True), "cpu", tmp_path / "trace.json")
    profiler.start(LEFT_OUT)
    profiler.resume()
    for _ in range(LEFT_OUT):
        profiler.step(1)
    profiler.pause()
    profiler.close()
    assert profiler.summary()["iterations"] == LEFT_OUT and not (tmp_path / "trace.json").exists()


class FakeNvml(SimpleNamespace):
    """NVML of a GPU whose counter advances 5 joules at every reading."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counts: bool = True) -> None:
        super().__init__(joules=100.0, counts=counts, requests=[])

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.requests.append(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counts:
            raise self.NVMLError("Not Supported")
        self.joules += 5
        return 1e3 * self.joules

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=87)


def test_energy_is_that_of_the_iterations(monkeypatch):
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    meter = GpuMeter("cuda:0")
    assert meter.missing is None and nvml.requests == ["GPU-1234"] and meter.utilization() == 87
    monkeypatch.setattr("pecker_fast.profiling.profiler.GpuMeter", lambda device: meter)
    profiler = Profiler(Regions(True), "cpu")
    profiler.start(2)
    for _ in range(2):
        profiler.resume()
        profiler.step(10)
        profiler.pause()
        meter.joules()
    assert profiler.joules == 10.0
    assert profiler.summary(profiler.joules)["joules_per_image"] == 0.5
    assert profiler.record()["energy_joules"] == 10.0 and "0.5 J/image" in profiler.table(10.0)


def test_gpu_without_energy_counters(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(counts=False))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    meter = GpuMeter("cuda:0")
    assert meter.missing == "NVML: Not Supported" and meter.joules() is None and meter.utilization() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter("cuda:0").missing == "nvidia-ml-py is not installed"


def test_only_profiled_runs_have_figures(capsys, tmp_path):
    small = ["--max_train_steps", "12", "--train_batch_size", "2", "--forget_batch_size", "2", "--no-progress_bar"]
    small += ["--saliency_batch_size", "2", "--logging_steps", "1", "--no-evaluate"]
    main(["unlearn", "--output_dir", str(tmp_path / "a"), *small, "--profile"])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    phases = {"sampling", "score step", "saliency", "selection", "generator forward", "generator backward", "optimizer"}
    assert phases <= set(lines[0]["profile_seconds"]) and lines[0]["peak_memory_bytes"] > 0
    profile = json.loads((tmp_path / "a" / "profile.json").read_text())
    assert profile["iterations"] == 12 - LEFT_OUT and profile["joules_per_image"] is None
    assert sum(profile["seconds_by_region"].values()) <= profile["seconds"]
    assert (tmp_path / "a" / "profile.txt").read_text().strip() in printed
    events = json.loads((tmp_path / "a" / "trace.json").read_text())["traceEvents"]
    assert phases - {"saliency", "selection"} <= {event.get("name") for event in events}
    main(["unlearn", "--output_dir", str(tmp_path / "b"), *small])
    first = json.loads((tmp_path / "b" / "train.jsonl").read_text().splitlines()[0])
    assert "profile_seconds" not in first and not (tmp_path / "b" / "trace.json").exists()
    assert first["loss_distill"] == lines[0]["loss_distill"]
