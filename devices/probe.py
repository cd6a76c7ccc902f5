"""What this machine is: the memory a cgroup leaves to the process, and the threads it may use."""

import os
from collections.abc import Iterator
from pathlib import Path

# (controller of /proc/self/cgroup, mount point under /sys/fs/cgroup, limit file, usage file, prefix of the keys of
# memory.stat that count the cgroups below too); version 2 names no controller.
CGROUP_FILES = (
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ("", "", "memory.max", "memory.current", ""),
    ("", "unified", "memory.max", "memory.current", ""),
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
    """Threads this process may use: its affinity where the system tells, else all cores."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _limits(cgroups: str, mounts: str) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use but for cached files) of each cgroup that has a limit."""
    for controller, path in _cgroups(Path(cgroups)):
        for wanted, mount, limit_name, usage_name, prefix in CGROUP_FILES:
            if wanted not in controller.split(","):
                continue
            for directory in _upwards(Path(mounts, mount), path):
                limit, usage = _number(directory / limit_name), _number(directory / usage_name)
                if limit is not None:
                    yield limit, max((usage or 0) - _cached_files(directory / "memory.stat", prefix), 0)


def _cgroups(file: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each line "number:controllers:path"."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return []
    return [tuple(line.split(":", 2)[1:]) for line in lines if line.count(":") >= 2]


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


def _number(file: Path) -> int | None:
    """A whole number in a file; None for "max" or when it cannot be read."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
