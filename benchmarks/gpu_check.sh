#!/usr/bin/env bash
# Everything there is to know about the kernels on this machine's GPU, in stages of at most four minutes:
#
#     PYTHON=python3 benchmarks/gpu_check.sh [--stage build|correct|kernels|steps|sanitize|all] [--wheels FOLDER]
#
# Needs no network and installs nothing: the interpreter at hand has torch, numpy and pytest, the CUDA toolkit has nvcc.
# Packages that it lacks are taken from a folder of pure-Python wheels if one is given. gpu_check.py says what the stages
# do and where their JSON is.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
