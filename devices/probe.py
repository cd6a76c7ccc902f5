"""The resources of this process: the memory that its cgroups allow, and the threads that it may use."""

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
    """`free_bytes`, or less if a cgroup of this process or an ancestor allows less.

    The page cache counts as free: a cgroup that has just copied a bundle is full of it, and it can be evicted.
    """
    return min([free_bytes, *(max(limit - used, 0) for limit, used in _limits(cgroups, mounts))])


def cgroup_limit_bytes(cgroups: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int | None:
    """The lowest memory limit of this process's cgroups and their ancestors, or None."""
    return min((limit for limit, _ in _limits(cgroups, mounts)), default=None)


def default_threads() -> int:
    """The default number of threads: the processors this process may use, without efficiency cores."""
    return min(usable_processors(), _core.performance_cores() or usable_processors())


def usable_processors(cgroups: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int:
    """The number of processors this process may use: by its affinity if known, else all, limited by its quota.

    A cgroup's quota of CPU time, as in containers, is rounded up to whole processors.
    """
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:
        processors = os.cpu_count() or 1
    return min([processors, *(max(math.ceil(quota), 1) for quota in _quotas(cgroups, mounts))])


def _quotas(cgroups: str, mounts: str) -> Iterator[float]:
    """Yield the quota of each cgroup that has one, in seconds of CPU time per second."""
    for directory, (_, _, quota_name, period_name) in _directories(cgroups, mounts, QUOTA_FILES):
        quota, period = _number(directory / quota_name, 0), _number(directory / period_name, -1)
        if quota and period and quota > 0 and period > 0:
            yield quota / period


def _limits(cgroups: str, mounts: str) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use without the page cache) of each cgroup that has a limit."""
    for directory, (_, _, limit_name, usage_name, prefix) in _directories(cgroups, mounts, CGROUP_FILES):
        limit, usage = _number(directory / limit_name), _number(directory / usage_name)
        if limit is not None:
            yield limit, max((usage or 0) - _cached_files(directory / "memory.stat", prefix), 0)


def _directories(cgroups: str, mounts: str, table: tuple[tuple[str, ...], ...]) -> Iterator[tuple[Path, tuple]]:
    """Yield the directories of this process's cgroups and their ancestors, each with its row of `table`."""
    for controllers, path in _cgroups(Path(cgroups)):
        for row in table:
            if row[0] in controllers.split(","):
                yield from ((directory, row) for directory in _upwards(Path(mounts, row[1]), path))


def _cgroups(file: Path) -> list[tuple[str, str]]:
    """The (controllers, path) of each line "number:controllers:path"."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return []
    return [
        (controllers, path) for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1)
    ]


def _upwards(mount: Path, path: str) -> list[Path]:
    """The directories of a cgroup and its ancestors, the mount point last."""
    parts = [part for part in path.split("/") if part]
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _cached_files(file: Path, prefix: str) -> int:
    """Bytes of the page cache by memory.stat; 0 if it cannot be read."""
    wanted = (f"{prefix}active_file", f"{prefix}inactive_file")
    try:
        pairs = [line.split() for line in file.read_text().splitlines()]
        return sum(int(value) for key, value in pairs if key in wanted)
    except (OSError, ValueError):
        return 0


def _number(file: Path, word: int | None = None) -> int | None:
    """The integer in a file, or in one word of it; None for "max" or if it cannot be read."""
    try:
        text = file.read_text()
        return int(text if word is None else text.split()[word])
    except (OSError, ValueError, IndexError):
        return None
