"""gpu_check.sh without a GPU: all stages except the GPU's own work, with only torch, numpy and pytest installed."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from pecker_fast.benchmarks.timing import Clock

from pecker_fast.benchmarks import gpu_check, small_ninja

ROOT = Path(__file__).resolve().parents[2]
ONLY_TORCH = ROOT / "tests" / "only_torch"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


def environment() -> dict[str, str]:
    """As on a machine without a network, with nothing installed but torch, numpy and pytest."""
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("PECKER_FAST")},
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ONLY_TORCH),
        "PIP_NO_INDEX": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def test_environment_has_only_torch():
    code = (
        "import importlib.util as u, torch, numpy, pytest\n"
        "missing = ('tyro', 'diffusers', 'torch_fidelity', 'expecttest', 'safetensors', 'tqdm', 'ninja')\n"
        "assert not [name for name in missing if u.find_spec(name)]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), cwd=ROOT)


@pytest.mark.slow
def test_all_stages_are_rehearsed(tmp_path):
    command = [str(ROOT / "benchmarks" / "gpu_check.sh"), "--stage", "all", "--rehearse", "--out", str(tmp_path)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == list(gpu_check.STAGES)
    assert {stage["status"] for stage in summary.values()} == {"passed"}
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in gpu_check.STAGES}
    assert results["build"]["rehearsed"] and set(results["build"]["missing"]) == {"cpu", "cuda"}
    tests = results["correct"]["cpu"]
    assert tests["passed"] > 10 and tests["skipped"] > 0 and tests["finished"] and "failed" not in tests
    for name in ("kernels", "steps"):
        assert results[name]["rows"] and not results[name]["missed"], results[name]["missed"]
        assert all("number" in row for row in results[name]["rows"])
    assert results["sanitize"]["exercise_exit_code"] == 0


def test_stage_is_killed_at_its_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "RESERVE_SECONDS", 0.0)
    options = gpu_check.argparse.Namespace(limit=0.2, rehearse=True)
    result = gpu_check.run_stage("kernels", tmp_path, options, dict(os.environ))
    assert result["status"] == "out of time" and result["seconds"] < 60


def test_message_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    with pytest.raises(SystemExit, match=r"torch finds no CUDA device.*--rehearse"):
        gpu_check.main(["--stage", "build"])


def test_all_operations_of_the_stages_exist():
    from pecker_fast.benchmarks.inputs import DTYPES
    from pecker_fast.benchmarks.registry import OPS
    from pecker_fast.benchmarks.shapes import SIZES

    from pecker_fast.benchmarks import gpu_figures  # noqa: F401

    for names, size, dtype in gpu_check.KERNELS + gpu_check.STEPS:
        assert size in SIZES and dtype in DTYPES
        assert all("cuda" in OPS[name].devices for name in names)
    for test in (*gpu_check.TESTS, *gpu_check.LEFT_OUT):
        assert (ROOT / test).exists(), test


def test_outcomes_are_written(tmp_path):
    test = tmp_path / "test_three.py"
    test.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0, 'why'\n@pytest.mark.skip\ndef test_c(): 1\n"
    )
    target = tmp_path / "out.json"
    command = [sys.executable, "-m", "pecker_fast.benchmarks.gpu_check", "--tests", str(target), str(test)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 1
    outcomes = json.loads(target.read_text())
    assert (outcomes["passed"], outcomes["skipped"], len(outcomes["failed"])) == (1, 1, 1)
    assert outcomes["failed"][0]["test"].endswith("test_b") and "why" in outcomes["failed"][0]["text"]


def test_wheels_are_used_only_for_missing_packages(tmp_path):
    for name, module in (("absent_package-1.0", "absent_package"), ("torch-1.0", "torch")):
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{module}/__init__.py", "here = True")
            wheel.writestr(f"{name}.dist-info/METADATA", "")
    (chosen,) = gpu_check.wheels_to_import(tmp_path)
    code = "import absent_package; assert absent_package.here"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": chosen})


# ---- compiling without ninja

NINJA = """ninja_required_version = 1.3
cxx = {cxx}

cflags = -O1 $
  -DVALUE=7
post_cflags = -std=c++17
rule compile
  command = $cxx -MMD -MF $out.d $cflags -c $in -o $out $post_cflags
  depfile = $out.d
  deps = gcc

build {folder}/a.o: compile {folder}/a.cpp
build {folder}/b.o: compile {folder}/b.cpp

default {folder}/a.o {folder}/b.o
"""


def test_small_ninja_recompiles_changed_files(tmp_path, monkeypatch, capsys):
    from tests.emulation.library import compiler

    if compiler() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "shared.h").write_text("inline int shared() { return VALUE; }\n")
    for name in "ab":
        (tmp_path / f"{name}.cpp").write_text(f'#include "shared.h"\nint {name}() {{ return shared(); }}\n')
    (tmp_path / "build.ninja").write_text(NINJA.format(cxx=compiler(), folder=tmp_path))
    monkeypatch.chdir(tmp_path)
    assert small_ninja.main(["-v", "-j", "2"]) == 0
    assert (tmp_path / "a.o").exists() and (tmp_path / "b.o").exists() and "[2/2]" in capsys.readouterr().out
    assert small_ninja.main(["-v", "-j", "2"]) == 0 and capsys.readouterr().out == ""
    later = (tmp_path / "a.o").stat().st_mtime + 5
    os.utime(tmp_path / "a.cpp", (later, later))
    assert small_ninja.main(["-v"]) == 0 and "[1/1]" in capsys.readouterr().out
    (tmp_path / "a.cpp").write_text("not C++")
    os.utime(tmp_path / "a.cpp", (later + 9, later + 9))
    assert small_ninja.main(["-v"]) == 1 and "error" in capsys.readouterr().out


def test_small_ninja_reads_torch_build_files(tmp_path):
    from torch.utils import cpp_extension

    source, target = tmp_path / "with space" / "a.cpp", tmp_path / "a.o"
    source.parent.mkdir()
    source.write_text("")
    known = cpp_extension._write_ninja_file.__code__.co_varnames
    values = {"path": str(tmp_path / "build.ninja"), "cflags": ["-O3", "-DNAME=1"], "post_cflags": ["-std=c++17"]}
    values |= {"sources": [str(source)], "objects": [str(target)], "ldflags": None, "library_target": None}
    values |= {"with_cuda": False, "with_sycl": False}
    for name in ("cuda_cflags", "cuda_post_cflags", "cuda_dlink_post_cflags"):
        values[name] = None
    for name in ("sycl_cflags", "sycl_post_cflags", "sycl_dlink_post_cflags"):
        values[name] = None
    cpp_extension._write_ninja_file(**{name: value for name, value in values.items() if name in known})
    (job,) = small_ninja.parse((tmp_path / "build.ninja").read_text())
    assert job.target == str(target) and job.sources == (str(source),)
    assert "-DNAME=1" in job.command and job.command.endswith("-std=c++17") and "$" not in job.command


# ---- the clock


def test_gpu_sleeps_during_launches(monkeypatch):
    """With a stand-in for torch.cuda that records its calls."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            calls.append("event")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, other):
            return 10.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append(("sleep", cycles)), raising=False)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(4, **options))
    clock = Clock(torch.device("cuda"))
    calls.clear()

    def function():
        calls.append("call")
        gpu_check.time.sleep(0.01)

    assert clock(function) == 0.01 and clock(function) == 0.01
    first, second = calls[:5], calls[5:]
    assert first[1:] == ["event", "call", "event", "wait"] and second[1:] == first[1:]
    # 2e7 cycles take 10 ms on this clock: as long as the first call took to launch, plus half of that.
    assert first[0][0] == "sleep" and second[0][1] >= 1.5 * 2e7 > first[0][1]
