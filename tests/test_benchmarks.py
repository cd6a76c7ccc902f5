"""The benchmarks of `pytest bench`: each runs, small and without a clock, and its results are right."""

import subprocess
import sys
from pathlib import Path


def test_every_benchmark_runs_and_computes_what_it_should():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-v", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    passed = [line.split("::")[0] for line in done.stdout.splitlines() if " PASSED " in line]
    counts = {name: passed.count(f"bench/bench_{name}.py") for name in ("kernels", "paging", "end_to_end")}
    assert counts == {"kernels": 2 * 8, "paging": 5, "end_to_end": 3}
    assert "skipped" not in done.stdout
