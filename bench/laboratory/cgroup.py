"""A memory cgroup for a child process, which the kernel kills above a limit; its peak includes the page cache.

Supports Linux cgroups version 1 and 2, if this process may create one below its own (root, or a delegated subtree).
"""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LIMIT = {"v1": "memory.limit_in_bytes", "v2": "memory.max"}
PEAK = {"v1": "memory.max_usage_in_bytes", "v2": "memory.peak"}


@dataclass(frozen=True, slots=True)
class Cgroup:
    path: Path
    version: str  # a key of LIMIT

    def join(self) -> None:
        """Move the calling process into the cgroup, as a `preexec_fn` of subprocess."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int:
        """The peak memory that the kernel counted; 0 if it does not report it."""
        peak = self.path / PEAK[self.version]
        return int(peak.read_text()) if peak.exists() else 0

    def remove(self) -> None:
        """Remove the cgroup, whose processes must have ended."""
        self.path.rmdir()


def make(limit_bytes: int) -> Cgroup:
    """Create a cgroup below this process's own. Raises PermissionError if that is not allowed."""
    for line in Path("/proc/self/cgroup").read_text().splitlines() if sys.platform == "linux" else ():
        _, controllers, own = line.split(":", 2)
        version = "v1" if "memory" in controllers.split(",") else "v2" if not controllers else None
        mount = "/sys/fs/cgroup/memory" if version == "v1" else "/sys/fs/cgroup"
        if version is None:
            continue
        try:
            path = Path(tempfile.mkdtemp(prefix="edge-moe-", dir=mount + own))
        except OSError:
            continue
        try:
            (path / LIMIT[version]).write_text(str(limit_bytes))
            return Cgroup(path, version)
        except OSError:
            path.rmdir()
    raise PermissionError("no memory cgroup can be made here; it needs Linux and the right to make one (root)")
