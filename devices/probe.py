"""What this machine is: the memory a cgroup leaves to the process, and the threads it may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from .. import _core

# (controller of /proc/self/cgroup, mount point under /sys/fs/cgroup, limit file, usage file, prefix of the keys of
# memory.stat that count the cgroups below too); version 2 names no controller.
CGROUP_FILES = (
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ("", "", "memory.max", "memory.current", ""),
    ("", "unified", "memory.max", "memory.current", ""),
)
# (controller, mount point, file with the quota, file with the period); version 2 has both in one.
QUOTA_FILES = (
    ("cpu", "cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
    ("cpu", "cpu,cpuacct", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
    ("", "", "cpu.max", "cpu.max"),
    ("", "unified", "cpu.max", "cpu.max"),
)


def memory_limit_bytes(free_bytes: int, cgroups: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int:
    """`free_bytes`, or less where a cgroup of this process or one above it leaves less room.

    Cached files count as room: a cgroup that has just copied a bundle is full of them, and they give way.
    """
    return min([free_bytes, *(max(limit - used, 0) for limit, used in _limits(cgroups, mounts))])


def cgroup_limit_bytes(cgroups: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int | None:
    """The lowest limit of a cgroup of this process or one above it; None where there is none."""
    return min((limit for limit, _ in _limits(cgroups, mounts)), default=None)


def default_threads() -> int:
    """Threads that compute best: the processors this process may use, but no slow cores beside fast ones."""
    return min(usable_processors(), _core.performance_cores() or usable_processors())


def usable_processors(cgroups: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int:
    """Processors this process may use: its affinity where the system tells, else all, and no more than its quota.

    A cgroup's quota of CPU time, as containers have, is rounded up to whole processors.
    """
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:
        processors = os.cpu_count() or 1
    return min([processors, *(max(math.ceil(quota), 1) for quota in _quotas(cgroups, mounts))])


def _quotas(cgroups: str, mounts: str) -> Iterator[float]:
    """Of each cgroup that has a quota: seconds of CPU time it may use in a second."""
    for directory, (_, _, quota_name, period_name) in _directories(cgroups, mounts, QUOTA_FILES):
        quota, period = _number(directory / quota_name, 0), _number(directory / period_name, -1)
        if quota and period and quota > 0 and period > 0:
            yield quota / period


def _limits(cgroups: str, mounts: str) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use but for cached files) of each cgroup that has a limit."""
    for directory, (_, _, limit_name, usage_name, prefix) in _directories(cgroups, mounts, CGROUP_FILES):
        limit, usage = _number(directory / limit_name), _number(directory / usage_name)
        if limit is not None:
            yield limit, max((usage or 0) - _cached_files(directory / "memory.stat", prefix), 0)


def _directories(cgroups: str, mounts: str, table: tuple[tuple[str, ...], ...]) -> Iterator[tuple[Path, tuple]]:
    """Of this process's cgroups and those above them, with the row of a table (controller, mount point, ...)."""
    for controllers, path in _cgroups(Path(cgroups)):
        for row in table:
            if row[0] in controllers.split(","):
                yield from ((directory, row) for directory in _upwards(Path(mounts, row[1]), path))


def _cgroups(file: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each line "number:controllers:path"."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return []
    return [
        (controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1)
    ]


def _upwards(mount: Path, path: str) -> list[Path]:
    """The cgroup's directory and all above it, the mount point last."""
    parts = [part for part in path.split("/") if part]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _cached_files(file: Path, prefix: str) -> int:
    """Bytes of the page cache that memory.stat counts; 0 when it cannot be read."""
    wanted = (f"{prefix}active_file", f"{prefix}inactive_file")
    try:
        pairs = [line.split() for line in file.read_text().splitlines()]
        return sum(int(value) for key, value in pairs if key in wanted)
    except (OSError, ValueError):
        return 0


def _number(file: Path, word: int | None = None) -> int | None:
    """The whole number that a file is, or that one word of it is; None for "max" or when it cannot be read."""
    try:
        text = file.read_text()
        return int(text if word is None else text.split()[word])
    except (OSError, ValueError, IndexError):
        return None
