"""The CPU kernels with the other instruction sets of this machine. One process has one, so pytest runs in a child."""

import os
from pathlib import Path

import pytest
import torch

from pecker_fast.ops.extension import cpu_isa
from tests import processes
from tests.conftest import SEED_VARIABLE, available_backends

HERE = Path(__file__).parent
# The last ones have the most tests.
FILES = [["test_quotients.py", "test_packing.py", "test_pointwise.py"], ["test_select.py", "test_adam.py"]]


def isa_in_a_child(requested: str) -> str:
    """The instruction set of a process that requests ``requested``: the best available one up to it."""
    program = "from pecker_fast.ops.extension import cpu_isa; print(cpu_isa())"
    child = processes.run(["-c", program], env={**os.environ, "PECKER_FAST_CPU_ISA": requested})
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@pytest.mark.parametrize(
    "files", [pytest.param(FILES[0], id="short"), pytest.param(FILES[1], id="long", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_other_instruction_sets(isa, files, seed):
    if "cpu" not in available_backends():
        pytest.skip("the CPU kernels are not tested here")
    if cpu_isa() == isa:
        pytest.skip("what this process runs with")
    if isa_in_a_child(isa) != isa:
        pytest.skip(f"this CPU has no {isa}")
    environment = {
        **os.environ,
        "PECKER_FAST_CPU_ISA": isa,
        "PECKER_FAST_TEST_BACKENDS": "cpu",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        SEED_VARIABLE: str(seed),
    }
    command = ["-m", "pytest", "-x", "-p", "no:cacheprovider", *(str(HERE / name) for name in files)]
    child = processes.run(command, env=environment)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
