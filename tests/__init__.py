"""Tests. This module is imported before torch, in each process of the tests."""

import os

# Threads that wait sleep: more of them than cores would otherwise spend half of the time on waiting for one another.
# OpenMP (of torch) and OpenBLAS (of numpy) read this when they are loaded, also in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
