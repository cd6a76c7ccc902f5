#!/usr/bin/env bash
# Runs bench/gpu_check.sh on a Jetson and reports the board's conditions as well: release, power mode, clocks, disk, and
# tegrastats during the run. Changes nothing on the board: set the power mode first, for example with `nvpmodel -m 0`.
#
#     bench/on_jetson.sh [--quick]       PYTHON=python3, OUT=bench/reports
set -euo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-bench/reports}"
mkdir -p "$out"
command -v tegrastats >/dev/null || { echo "no tegrastats: this is no Jetson; run bench/gpu_check.sh" >&2; exit 1; }

log="$(mktemp)"
tegrastats --interval 1000 >"$log" &
watcher=$!
trap 'kill "$watcher" 2>/dev/null; rm -f "$log"' EXIT

status=0
bench/gpu_check.sh "$@" || status=$?

{
  echo "# Conditions"
  for command in "cat /etc/nv_tegra_release" "uname -r" "nvpmodel -q" "jetson_clocks --show" "free -b" \
    "lsblk -o NAME,SIZE,TYPE,MODEL,MOUNTPOINT" "df -h ."; do
    printf '\n## %s\n\n' "$command"
    $command 2>&1 | sed 's/^/    /' || true
  done
  printf '\n## tegrastats, every tenth second\n\n'
  awk 'NR % 10 == 1 { print "    " $0 }' "$log"
} >"$out/jetson-conditions.md"
echo "wrote $out/jetson-conditions.md" >&2
exit "$status"
