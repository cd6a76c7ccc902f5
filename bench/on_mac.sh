#!/usr/bin/env bash
# Builds edge-moe with the mlx device on this Mac, checks it, and measures it: tests, kernels by width, costs of the
# host, the disk, and speed under six caps beside mlx_lm. Writes bench/reports/mlx-CHIP.json and .md. Takes about half an
# hour and 12 GB of disk; --quick ten minutes and 3 GB. Plug a laptop in, and close what uses the GPU.
#
#     bench/on_mac.sh [--quick] [--layers N]       PYTHON=python3, OUT=bench/reports, WORK=a new directory
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}" out="${OUT:-bench/reports}" work="${WORK:-$(mktemp -d)}"
"$python" -m venv "$work/venv"
# shellcheck disable=SC1091
. "$work/venv/bin/activate"
pip install --quiet ".[test,mlx]" "mlx-lm>=0.22"
PYTHONPATH=. python -m bench.laboratory.mac_report "$out" tests "$@"
