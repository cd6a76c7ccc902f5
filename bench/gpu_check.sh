#!/usr/bin/env bash
# Builds, checks and measures the CUDA device on a machine with an NVIDIA GPU, nvcc, Python and the packages that
# pyproject.toml lists for building, running and tests; downloads nothing. Writes bench/reports/cuda-GPU.json and .md.
#
#     bench/gpu_check.sh [--quick]       PYTHON=python3, OUT=bench/reports, WORK=a new directory
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}" out="${OUT:-bench/reports}" work="${WORK:-$(mktemp -d)}"
mkdir -p "$work"

architecture="$("$python" - <<'PY'
import sys
sys.path.insert(0, "devices")
import nvidia
driver = nvidia.find_driver()
if not driver or not driver.gpus:
    sys.exit("no NVIDIA GPU: the driver's library is not here, or finds none")
print(driver.gpus[0].compute_capability.replace(".", ""))
PY
)"
jobs="$(nproc)"
echo "compute capability $architecture; building in $work" >&2

# The kernels' own programs, then the package, for this GPU only.
cmake -S devices -B "$work/devices" -DEDGE_MOE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" >"$work/cmake.log"
cmake --build "$work/devices" --target check_cuda bench_cuda -j "$jobs" >>"$work/cmake.log" &
programs=$!
"$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --upgrade --target "$work/site" . \
  -Ccmake.define.EDGE_MOE_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture"
wait "$programs"

PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" "$python" -m bench.laboratory.cuda_report \
  "$work/devices" tests "$out" "$@"
