"""The CPU kernels run on torch's threads. The test counts threads of a fresh process; a time would prove nothing."""

from pathlib import Path

import pytest

from tests import processes
from tests.conftest import available_backends

# The tensors come from numpy: torch would start its threads to fill them.
PROGRAM = """
import os, sys
import numpy as np, torch
import pecker_fast as pf
torch.set_num_threads(int(sys.argv[1]))
torch.set_num_interop_threads(1)
score = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32))
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
if sys.argv[2] == "select":
    pf.saliency_mask([score], density=0.5, backend="cpu")
else:
    param = torch.nn.Parameter(torch.from_numpy(np.zeros(1 << 21, dtype=np.float32)))
    param.grad = score
    pf.MaskedAdam([param], backend="cpu").step()
print(count() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("op", ["select", "adam"])
def test_kernels_start_torchs_threads(op):
    if "cpu" not in available_backends():
        pytest.skip("the CPU kernels are not tested here")
    started = {}
    for threads in (1, 2):
        child = processes.run(["-c", PROGRAM, str(threads), op])
        assert child.returncode == 0, child.stderr
        started[threads] = int(child.stdout)
    assert started[2] == started[1] + 1
