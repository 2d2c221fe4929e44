"""Check and measure the kernels on a machine with a GPU, in stages that each end within four minutes.

``benchmarks/gpu_check.sh --stage all`` runs the stages in the order of importance:

build     compiles the kernels into the source tree, for this GPU only
correct   the tests of the operators and of the code above them, on the CUDA back end, then on Triton's
kernels   selections and the other operators against their rivals, and against the memory's speed
steps     steps of MaskedAdam against theirs, and an iteration of the trainer if diffusers is installed
sanitize  compute-sanitizer (memcheck, racecheck) over small calls of every operator

Each stage is a separate process. It writes <out>/<stage>.json as it goes, so that no measurement is lost when its time
is up, and <out>/<stage>.log. If a stage fails, the next ones still run.
"""

import argparse
import datetime
import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Not as a module of the package, whose import imports torch: the processes that only start others need none.
SCRIPT = [sys.executable, str(Path(__file__).resolve())]
STAGES = ("build", "correct", "kernels", "steps", "sanitize")
LIMIT_SECONDS = 235.0
# Kept free at the end of a stage for the work after the last measurement.
RESERVE_SECONDS = 10.0

# Tests of the CPU kernels' instruction sets and of CPU threads are left out.
TESTS = ("tests/test_gpu.py", "tests/ops", "tests/test_saliency.py", "tests/test_optim.py", "tests/test_optim_state.py")
LEFT_OUT = ("tests/ops/test_isa.py", "tests/ops/test_threads.py")

# Operations, size and dtype of the benchmarks, the most important first.
KERNELS = (
    (("saliency_mask", "saliency_mask_memory"), "sd15", "float32"),
    (("saliency_mask", "saliency_mask_memory"), "sd15", "bfloat16"),
    (("saliency_mask", "saliency_mask_inputs", "saliency_mask_densities"), "cifar10", "float32"),
    (("saliency_mask_memory",), "cifar10", "bfloat16"),
    (("accumulate", "apply_mask", "saliency_mask_densities"), "sd15", "float32"),
    (("triton_over_cuda",), "cifar10", "float32"),
)
STEPS = (
    (("masked_adam", "share_plain", "masked_speedup"), "sd15", "float32"),
    (("masked_adam", "share_plain", "masked_speedup"), "sd15", "bfloat16"),
    (("launches",), "cifar10", "float32"),
    (("share_beta0", "share_ema", "share_joint", "share_joint_all", "share_packed", "joint_rivals"), "sd15", "float32"),
    (("fetch_granularity",), "sd15", "float32"),
    (("masked_adam_beta0", "masked_adam_packed", "masked_adam_masked", "masked_adam_joint"), "cifar10", "float32"),
)
REHEARSED_KERNELS = ((("saliency_mask", "accumulate"), "tiny", "float32"),)
REHEARSED_STEPS = ((("masked_adam", "masked_adam_joint"), "tiny", "bfloat16"),)


def write_json(path: Path, value: Any) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


class Clock:
    """The time that a stage has left."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        return self._seconds - self.elapsed


# ---- stages


def build(path: Path, clock: Clock, rehearse: bool) -> int:
    """Compiles both libraries, for this GPU's architecture only."""
    sys.path.insert(0, str(ROOT))
    import torch

    import setup

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability is not None:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{capability[0]}.{capability[1]}")
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST"),
        "jobs": int(os.environ["MAX_JOBS"]),
        "ninja": os.environ.get("PECKER_FAST_NINJA", "ninja"),
    }
    if rehearse:
        result |= {"rehearsed": True, "missing": {"cpu": setup.why_no_cpu(), "cuda": setup.why_no_cuda()}}
        write_json(path, result)
        return 0
    write_json(path, result)
    result["missing"] = setup.build_in_place()
    result["seconds"] = clock.elapsed
    write_json(path, result)
    for backend, reason in result["missing"].items():
        if reason is not None:
            print(f"no {backend} kernels: {reason}")
    return 0 if result["missing"]["cuda"] is None else 1


class Recorder:
    """A pytest plugin that writes the outcome of each test, at most once a second."""

    def __init__(self, path: Path, results: dict[str, Any]) -> None:
        self._path, self._results, self._written = path, results, 0.0

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._add(report.nodeid, "not collected", 0.0, str(report.longrepr))

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report.nodeid, report.outcome, report.duration, str(report.longrepr) if report.failed else "")

    def pytest_sessionfinish(self) -> None:
        write_json(self._path, self._results)

    def _add(self, name: str, outcome: str, seconds: float, text: str) -> None:
        if outcome in ("passed", "skipped"):
            self._results[outcome] = self._results.get(outcome, 0) + 1
        else:
            failure = {"test": name, "outcome": outcome, "seconds": round(seconds, 2), "text": text[-3000:]}
            self._results.setdefault("failed", []).append(failure)
        if time.monotonic() - self._written > 1:
            write_json(self._path, self._results)
            self._written = time.monotonic()


def correct(path: Path, clock: Clock, rehearse: bool) -> int:
    """The tests, one back end after the other. Each is a process: conftest.py reads its back ends once."""
    backends = ("cpu",) if rehearse else ("cuda", "triton")
    results: dict[str, Any] = {}
    failed = 0
    for backend in backends:
        part = path.with_name(f"{path.stem}-{backend}.json")
        environment = {**os.environ, "PECKER_FAST_TEST_BACKENDS": backend, "PECKER_FAST_TEST_SEED": "1"}
        command = [*SCRIPT, "--tests", str(part)]
        tests = ["tests/test_gpu.py", "tests/ops/test_packing.py"] if rehearse else TESTS
        try:
            code = subprocess.run([*command, *tests], env=environment, cwd=ROOT, timeout=max(clock.left, 1)).returncode
        except subprocess.TimeoutExpired:
            code = -1
        outcome = json.loads(part.read_text()) if part.exists() else {}
        part.unlink(missing_ok=True)
        results[backend] = {**outcome, "finished": code in (0, 1), "exit_code": code}
        write_json(path, results)
        failed |= code != 0
        if clock.left < RESERVE_SECONDS:
            break
    return int(failed)


def run_tests(path: Path, tests: Sequence[str]) -> int:
    import pytest

    results: dict[str, Any] = {}
    # No cache of an earlier run, and no plugin but our own.
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--durations=0", "--durations-min=5"]
    options += [word for test in LEFT_OUT for word in ("--deselect", test)]
    return int(pytest.main([*options, *tests], plugins=[Recorder(path, results)]))


def measure(path: Path, clock: Clock, rehearse: bool, plan: Sequence[tuple], after: Callable | None = None) -> int:
    """Runs benchmarks while there is time; all rows so far are in the file after each."""
    import torch

    from pecker_fast.benchmarks import report, run

    device = "cpu" if rehearse else "cuda"
    results = {
        "version": run.FORMAT_VERSION,
        "conditions": run.conditions(torch.device(device)),
        "rows": [],
        "missed": [],
    }
    rows, missed = results["rows"], results["missed"]

    def progress(row: dict[str, Any]) -> None:
        print(
            f"{clock.elapsed:5.0f} s  {row['size']} {row['dtype']}  {row['figure']}: {report.cells(row)[4]}", flush=True
        )
        rows.append(row)
        run.save(results, path)

    for names, size, dtype in plan:
        for name in names:
            if clock.left < RESERVE_SECONDS:
                missed.append([name, size, dtype])
                continue

            settings = {"sizes": [size], "dtypes": [dtype], "threads": [1], "device": device}
            limits = {"max_seconds": 0.1 if rehearse else 0.6, "stop_after": clock.left - RESERVE_SECONDS}
            try:
                run.run([name], **settings, **limits, progress=progress)
            except Exception as error:  # a rival fails or memory runs out: go on with the next one
                missed.append([name, size, dtype, f"{type(error).__name__}: {error}"[:500]])
                print(f"{name} on {size} {dtype}: {error}")
                run.save(results, path)
    if after is not None and clock.left > RESERVE_SECONDS:
        results["train_step"] = after(clock)
    run.save(results, path)
    print(report.text_table(rows) if rows else "nothing was measured")
    return 0 if rows else 1


def kernels(path: Path, clock: Clock, rehearse: bool) -> int:
    return measure(path, clock, rehearse, REHEARSED_KERNELS if rehearse else KERNELS)


def steps(path: Path, clock: Clock, rehearse: bool) -> int:
    def train_step(clock: Clock) -> dict[str, Any]:
        if importlib.util.find_spec("diffusers") is None:
            return {"skipped": "diffusers is not installed"}
        target = path.with_name("train-step.json")
        command = [sys.executable, "-m", "pecker_fast.benchmarks.train_step", "--quick", "--repeats", "5"]
        command += ["--max-seconds", "8", "--device", "cpu" if rehearse else "cuda", "--json", str(target)]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=max(clock.left - 5, 1)).returncode
        except subprocess.TimeoutExpired:
            return {"skipped": "out of time"}
        return {"exit_code": code, "file": target.name}

    plan = REHEARSED_STEPS if rehearse else STEPS
    return measure(path, clock, rehearse, plan, None if rehearse else train_step)


def sanitize(path: Path, clock: Clock, rehearse: bool) -> int:
    """The tools over ``exercise``, in a process each."""
    import shutil

    results: dict[str, Any] = {}
    program = [*SCRIPT, "--exercise"]
    tool = shutil.which("compute-sanitizer")
    if rehearse or tool is None:
        reason = "rehearsed" if rehearse else "compute-sanitizer is not installed"
        code = subprocess.run([*program, *(["--rehearse"] if rehearse else [])], cwd=ROOT).returncode
        write_json(path, {"skipped": reason, "exercise_exit_code": code})
        return code
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = 0
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20", *program]
        start = clock.elapsed
        try:
            done = subprocess.run(command, env=environment, cwd=ROOT, timeout=max(clock.left - 5, 1), text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
            results[name] = {"exit_code": done.returncode, "output": done.stdout[-4000:]}
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            results[name] = {"exit_code": None, "stopped": "out of time", "output": output[-4000:]}
        results[name]["seconds"] = round(clock.elapsed - start, 1)
        print(results[name]["output"])
        write_json(path, results)
        failed |= results[name]["exit_code"] not in (0, None)
    return int(failed)


def exercise(device: str) -> None:
    """Small calls of every operator: all dtypes, kinds of steps and ways of selecting."""
    import torch

    import pecker_fast as pf
    from pecker_fast import ops

    backend = "cuda" if device == "cuda" else None
    sizes = (1, 33, 1024, 16384 + 5, 3 * 16384)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        scores = [torch.randn(n, device=device).to(dtype) for n in sizes]
        masks = pf.saliency_mask(scores, density=[0.5, 0.01], ties="all", backend=backend)
        pf.saliency_mask(scores, threshold=0.5, scope="tensor", backend=backend)
        masks[0].apply_([score.clone() for score in scores])
        dense = torch.randn(40_000, device=device).to(dtype)
        whole = pf.SaliencyMask.from_bool([dense > 0])
        packed = ops.pack(dense, whole.words, whole.count, backend=backend)
        ops.unpack(packed, whole.words, dense.numel(), backend=backend)
        options = (
            {},
            {"betas": (0.0, 0.9), "clip_value": 1.0, "ema_decay": 0.9},
            {"amsgrad": True, "weight_decay": 0.1},
        )
        for extra in (*options, {"packed": True}, {"nonfinite": "skip", "master_weights": dtype != torch.float32}):
            params = [torch.nn.Parameter(score.clone()) for score in scores]
            optimizer = pf.MaskedAdam(params, lr=1e-2, backend=backend, **extra)
            calls = [{"mask": masks[0]}, {"mask": masks[0]}]
            if not extra.get("packed"):
                masked_grads = [torch.randn_like(param) for param in params]
                calls += [{}, {"mask": masks[0], "masked_grads": masked_grads}, {"mask": masks[1]}]
            for call in calls:
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step(**call)
    params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in sizes]
    for reduce in ("sum", "abs_sum", "sq_sum"):
        accumulator = pf.SaliencyAccumulator(params, reduce, backend=backend)
        for param in params:
            param.grad = torch.randn_like(param)
        accumulator.add()
    # Large enough for the sampled selection, with one row and with several. Equal entries reach its last parts.
    numel = 4_300_000 if device == "cuda" else 50_000
    for large in (torch.randn(numel, device=device), torch.ones(numel, device=device)):
        pf.saliency_mask([large], density=0.5, backend=backend)
        pf.saliency_mask([large], density=[0.5, 0.1, 0.01], backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every operator has run")


RUNNERS = {"build": build, "correct": correct, "kernels": kernels, "steps": steps, "sanitize": sanitize}


# ---- the command


def wheels_to_import(folder: Path) -> list[str]:
    """Pure-Python wheels of a folder whose packages are not installed: Python can import straight from a wheel."""
    chosen = []
    for wheel in sorted(folder.glob("*-none-any.whl")):
        with zipfile.ZipFile(wheel) as archive:
            tops = {name.split("/")[0] for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        names = {top.removesuffix(".py") for top in tops if top.removesuffix(".py").isidentifier()}
        if any(importlib.util.find_spec(name) is None for name in names):
            chosen.append(str(wheel.resolve()))
    return chosen


def ninja_folder(folder: Path) -> dict[str, str]:
    """Environment variables that make ``small_ninja`` stand in for ninja on a machine without it."""
    try:
        subprocess.run(["ninja", "--version"], capture_output=True, check=True)
        return {}
    except (OSError, subprocess.CalledProcessError):
        script = folder / "ninja"
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / "benchmarks" / "small_ninja.py"}" "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PECKER_FAST_NINJA": "small_ninja.py"}


def run_stage(name: str, out: Path, options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """One stage in a separate process, which is ended when its time is up."""
    start = time.monotonic()
    command = [*SCRIPT, "--run", name, "--out", str(out)]
    command += ["--limit", str(options.limit), *(["--rehearse"] if options.rehearse else [])]
    print(f"==== {name}", flush=True)
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(options.limit + RESERVE_SECONDS / 2)
        except subprocess.TimeoutExpired:
            # The group includes the stage's own children.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    tail = (out / f"{name}.log").read_text(errors="replace")[-4000:]
    print(tail)
    status = "passed" if code == 0 else "out of time" if code is None else "failed"
    return {"status": status, "exit_code": code, "seconds": round(time.monotonic() - start, 1)}


def device_name(rehearse: bool) -> str:
    if rehearse:
        return "rehearsal"
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            "gpu_check: torch finds no CUDA device; on a machine without one --rehearse runs all but the GPU's work"
        )
    return torch.cuda.get_device_name().lower().replace(" ", "-")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="the kernels on this machine's GPU, in stages")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--wheels", type=Path, help="folder of pure-Python wheels for packages that are not installed")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results/<gpu>-<date> by default")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds that a stage may take")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: a CPU in its place, nothing is compiled"
    )
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--tests", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tests is not None:
        return run_tests(options.tests, options.paths)
    if options.exercise:
        exercise("cpu" if options.rehearse else "cuda")
        return 0
    if options.run is not None:
        return RUNNERS[options.run](options.out / f"{options.run}.json", Clock(options.limit), options.rehearse)

    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")
    out = options.out or ROOT / "benchmarks" / "results" / f"{device_name(options.rehearse)}-{today}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if options.wheels is not None:
            paths += wheels_to_import(options.wheels)
        environment = {
            **os.environ,
            **ninja_folder(Path(folder)),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            # Download nothing, and load no pytest plugin that happens to be installed.
            "PIP_NO_INDEX": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        }
        summary_path = out / "summary.json"
        summary: dict[str, Any] = json.loads(summary_path.read_text()) if summary_path.exists() else {}
        chosen = STAGES if options.stage == "all" else (options.stage,)
        for name in chosen:
            summary[name] = run_stage(name, out, options, environment)
            write_json(summary_path, summary)
    print("\n".join(f"{name:9} {summary[name]['status']:12} {summary[name]['seconds']} s" for name in chosen))
    print(f"written: {out}")
    return 0 if all(summary[name]["status"] == "passed" for name in chosen) else 1


if __name__ == "__main__":
    # The modules of this folder belong to the package; none is found by its bare name.
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
    sys.exit(main())
