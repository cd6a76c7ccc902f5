"""A memory cgroup for tests: a child process that the kernel kills above a limit."""

import json
import subprocess
import sys

import pytest

from bench.laboratory import cgroup
from bench.laboratory.cgroup import Cgroup


def make(limit_bytes: int) -> Cgroup:
    """A new cgroup below this process's own; skips the test where that is not allowed."""
    try:
        return cgroup.make(limit_bytes)
    except PermissionError as error:
        pytest.skip(str(error))


def run(arguments: list, limit_bytes: int) -> tuple[subprocess.CompletedProcess, int]:
    """`edge-moe ARGUMENTS --json` in a cgroup, and the most memory that the kernel counted."""
    group = make(limit_bytes)
    try:
        child = subprocess.run(
            [sys.executable, "-m", "edge_moe", *map(str, arguments), "--json"],
            capture_output=True,
            text=True,
            preexec_fn=group.join,
        )
        return child, group.peak_bytes
    finally:
        group.remove()


def run_json(arguments: list, limit_bytes: int) -> tuple[dict, int]:
    """As run(), but the object that the command prints."""
    child, peak = run(arguments, limit_bytes)
    assert child.returncode == 0, f"exit code {child.returncode} (-9: killed at the limit): {child.stderr}"
    return json.loads(child.stdout), peak
