"""Seeds, back ends and poisoned memory for all tests.

Random inputs are the same in every run. ``PECKER_FAST_TEST_SEED`` sets another seed, or a fresh one if it is
``random`` (``make test-random``); the seed is in the header and with every failure. ``PECKER_FAST_TEST_BACKENDS``
(names separated by commas) replaces the available back ends; the named ones must run.
"""

import gc
import importlib
import os
import random
import sys
import tempfile
import warnings
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from pecker_fast import ops
from pecker_fast.ops.dispatch import BACKENDS
from tests import remembered, triton_interpreter

# Diffusers copies the code of local pipelines here, not into the user's cache and not over another worker's copy.
_modules = tempfile.TemporaryDirectory(prefix="pecker-fast-modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name

if not torch.cuda.is_available():
    # Read by triton when it is imported: its kernels then run in the interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        triton_interpreter.speed_up()

SEED_VARIABLE = "PECKER_FAST_TEST_SEED"
_wanted_seed = os.environ.get(SEED_VARIABLE) or "1"
_session_seed = int.from_bytes(os.urandom(4), "little") if _wanted_seed == "random" else int(_wanted_seed)
# Inherited by pytest-xdist's workers, which must collect the same tests.
os.environ[SEED_VARIABLE] = str(_session_seed)


def _device(backend: str) -> str:
    return "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"


def _reasons() -> dict[str, str | None]:
    return {name: ops.backend_reasons(_device(name))[name] for name in BACKENDS}


def available_backends() -> list[str]:
    """Back ends to test, the reference first."""
    setting = os.environ.get("PECKER_FAST_TEST_BACKENDS")
    if setting:
        return [name.strip() for name in setting.split(",")]
    return [name for name in reversed(BACKENDS) if _reasons()[name] is None]


def pytest_report_header(config):
    missing = [f"{name}: {reason}" for name, reason in _reasons().items() if reason]
    return [
        f"{SEED_VARIABLE}={_session_seed}",
        f"back ends tested: {', '.join(available_backends())}" + (f" (not {'; '.join(missing)})" if missing else ""),
    ]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available_backends(), indirect=True)


# Small tensors on a busy machine: torch's own operators are faster without threads.
torch.set_num_threads(1)


@pytest.fixture
def backend(request):
    """The name of a back end that runs here; the test runs once with each."""
    torch.set_num_threads(random.choice((1, 2, 3)) if request.param == "cpu" else 1)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def device(backend) -> str:
    """The device whose tensors ``backend`` takes."""
    return _device(backend)


@pytest.fixture(autouse=True)
def default_device(request):
    """Makes tensors on the back end's device, in tests that do not place them themselves (by ``device``)."""
    names = request.fixturenames
    device = _device(request.getfixturevalue("backend")) if "backend" in names and "device" not in names else "cpu"
    if device == "cpu":
        yield
    else:
        with torch.device(device):
            yield


@pytest.fixture
def small(backend) -> bool:
    """Whether inputs have to be small: Triton's interpreter runs one program after another in Python."""
    return backend == "triton" and _device(backend) == "cpu"


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seeds torch, numpy and random, differently for each test, the same when a test is run alone."""
    value = zlib.crc32(f"{_session_seed}/{request.node.nodeid}".encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills memory from torch.empty and similar functions with NaN, or the largest integer, so that unwritten outputs
    show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    yield
    torch.use_deterministic_algorithms(False)


# Tests whose curves are drawn, with the layout that users get (True) or with a simple one.
DRAWN = {
    "report": True,
    "benchmarks": False,
    "test_unlearn.py": False,
    "test_sequence.py": False,
    "test_old_runs.py": False,
}


# Tests that make runs.
RUNS = {"benchmarks", "commands", "runs"}


@pytest.fixture(autouse=True, scope="module")
def quick_runs(request):
    """Saves blank pictures in place of curves, which take as long to draw as a small run takes, except in the tests of
    reports and some of runs, and computes what many runs share once in a process. It holds for a module, because
    fixtures of modules make runs, too."""
    parts = request.path.parts
    if RUNS & {*parts}:
        # Runs import them when they need them; only what has been imported can be replaced.
        for name in ("matplotlib.figure", "pecker_fast.runs.classes.measure"):
            if find_spec(name.partition(".")[0]):
                importlib.import_module(name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        layout = next((DRAWN[part] for part in parts if part in DRAWN), None)
        if "matplotlib" not in sys.modules:
            pass
        elif layout is None:
            monkeypatch.setattr("matplotlib.figure.Figure.savefig", _save_blank)
        elif not layout:
            # The search for the best margins takes half of the time.
            monkeypatch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda self, figure: None)
        remembered.remember(monkeypatch)
        yield


# The garbage collector takes a tenth of the time if it looks again and again at the million objects of modules and
# tests, which live as long as the process.
_modules_frozen = 0
gc.set_threshold(10_000)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 100:
        _modules_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


def _save_blank(figure, path, *, format: str = "png", dpi: float = 100, metadata: dict | None = None) -> None:
    from PIL import Image

    size = [max(1, round(dpi * inches)) for inches in figure.get_size_inches()]
    Image.new("RGB", size, "white").save(path, format=format)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        report.sections.append(("seed", f"run again with {SEED_VARIABLE}={_session_seed}"))
