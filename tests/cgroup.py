"""A memory cgroup for tests: a child process that the kernel kills above a limit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = {"v1": "memory.limit_in_bytes", "v2": "memory.max"}
PEAK = {"v1": "memory.max_usage_in_bytes", "v2": "memory.peak"}


def make(limit_bytes: int) -> tuple[Path, str]:
    """A new cgroup below this process's own and its version; skips the test where that is not allowed."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if sys.platform == "linux" else ():
        _, controllers, own = line.split(":", 2)
        version = "v1" if "memory" in controllers.split(",") else "v2" if not controllers else None
        mount = "/sys/fs/cgroup/memory" if version == "v1" else "/sys/fs/cgroup"
        if version is None:
            continue
        group = Path(mount + own) / f"edge-moe-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / LIMIT[version]).write_text(str(limit_bytes))
            return group, version
        except OSError:
            group.rmdir()
    pytest.skip("no memory cgroup can be made here")


def run_json(arguments: list, limit_bytes: int) -> tuple[dict, int]:
    """`edge-moe ARGUMENTS --json` in a cgroup; its object and the most memory that the kernel counted."""
    group, version = make(limit_bytes)
    try:
        child = subprocess.run(
            [sys.executable, "-m", "edge_moe", *map(str, arguments), "--json"],
            capture_output=True,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
        assert child.returncode == 0, f"exit code {child.returncode} (-9: killed at the limit): {child.stderr}"
        peak = group / PEAK[version]
        return json.loads(child.stdout), int(peak.read_text()) if peak.exists() else 0
    finally:
        group.rmdir()
