#!/usr/bin/env bash
# Everything there is to know about the kernels on this machine's GPU, in one command:
# builds, runs the tests on the GPU, compute-sanitizer on small shapes, and the benchmarks.
#
#     benchmarks/gpu_check.sh [--quick]
#
# Writes benchmarks/results/<gpu>-<date>.json (with device, versions and commit), a roofline plot and a log beside it.
# --quick leaves out the sanitizer and the largest networks.
set -euo pipefail
cd "$(dirname "$0")/.."

quick=0
for argument in "$@"; do
  case "$argument" in
    --quick) quick=1 ;;
    *) echo "gpu_check.sh: unknown argument $argument (only --quick is known)" >&2; exit 2 ;;
  esac
done

command -v nvidia-smi >/dev/null || { echo "gpu_check.sh: no nvidia-smi, so no NVIDIA driver: run this on a machine with a GPU" >&2; exit 2; }
make install
python=.venv/bin/python
$python - <<'PY'
import sys
import torch
from pecker_fast.ops import backend_reasons
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh: torch finds no CUDA device")
reason = backend_reasons("cuda")["cuda"]
if reason:
    sys.exit(f"gpu_check.sh: no compiled CUDA kernels: {reason}")
PY

name=$($python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
out="benchmarks/results/$name-$(date -u +%Y%m%d)"
mkdir -p benchmarks/results
exec > >(tee "$out.log") 2>&1
$python -m pecker_fast env

# The tests of the operators and of what rests on them, on both back ends that run there.
PECKER_FAST_TEST_BACKENDS=cuda,triton,reference $python -m pytest tests/test_gpu.py tests/ops tests/test_saliency.py tests/test_optim.py -q \
  --deselect tests/ops/test_isa.py --deselect tests/ops/test_errors.py

sizes=(cifar10 sd15)
if [ "$quick" = 0 ]; then
  sizes+=(sdxl)
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      PECKER_FAST_TEST_BACKENDS=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        $python -m pytest tests/ops/test_packing.py tests/ops/test_pointwise.py -q -x -k "not float64"
    done
  else
    echo "compute-sanitizer is not installed: left out"
  fi
fi

$python -m pecker_fast bench --device cuda --size "${sizes[@]}" --dtype float32 bfloat16 --max-seconds 1 --json "$out.json"
$python -m pecker_fast.benchmarks.plots "$out.json" "$out.png"
echo "written: $out.json $out.png"
