"""The machine's speeds of reading weights from memory, as the kernels do, and records from a disk.

`edge-moe doctor` measures and stores them, and `edge-moe plan` predicts speeds from them.
"""

from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import numpy as np

from .. import _core
from ..devices.probe import default_threads, memory_limit_bytes
from ..runtime.bundle import Bundle
from .bandwidth import directory_read_gbps, disk_read_gbps, memory_read_gbps
from .conditions import processor
from .kernel_bandwidth import kernel_bandwidth

WIDTHS = (1, 2, 3, 4, 6, 8)  # measured widths; speeds between them are interpolated
KERNEL_BYTES = 1 << 28  # of a matrix; less if memory is short
KERNEL_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Bandwidths in GB/s, the best of a few rounds. disks: by mount point, None without unbuffered reads."""

    processor: str
    threads: int
    memory_gbps: float
    kernel_gbps: dict[int, float]  # by width: codes, scales and biases, for one token
    measured: str  # the day
    disks: dict[str, float | None] = field(default_factory=dict)

    def weights_gbps(self, bits: float) -> float:
        """The kernels' GB/s for a matrix with `bits` bits a weight, scales and biases included."""
        if bits >= 16:
            return self.memory_gbps
        widths = sorted(self.kernel_gbps)
        return float(np.interp(bits - 0.5, widths, [self.kernel_gbps[width] for width in widths]))

    def as_dict(self) -> dict:
        return asdict(self) | {"kernel_gbps": {str(width): gbps for width, gbps in self.kernel_gbps.items()}}


def measure_machine(where: Path, known: Machine | None = None, tell=lambda step: None) -> Machine:
    """Measure memory, kernels and the disk of `where`, a bundle or a directory in which 268 MB are written and removed.

    known: earlier measurements, whose disks are kept. tell: called with the name of each step. Raises OSError if the
    directory is not writable.
    """
    threads = default_threads()
    tell("memory")
    memory = memory_read_gbps(threads)
    tell("kernels")
    room = memory_limit_bytes(_core.free_bytes())
    nbytes = max(min(KERNEL_BYTES, room // 4) & ~0xFFFFF, 1 << 20)
    kernels = kernel_bandwidth(threads, WIDTHS, KERNEL_ROUNDS, nbytes)
    tell("disk")
    is_bundle = (where / "bundle.json").exists()
    gbps = disk_read_gbps(Bundle.open(where)) if is_bundle else directory_read_gbps(where)
    disks = {**(known.disks if known else {}), mount_of(where): gbps}
    by_width = {one.width: one.best_gbps for one in kernels}
    return Machine(processor(), threads, memory, by_width, date.today().isoformat(), disks)


def machine_of(value) -> Machine | None:
    """The Machine from its as_dict(); None for any other value, or if it is of another machine."""
    try:
        kernel_gbps = {int(width): float(gbps) for width, gbps in value["kernel_gbps"].items()}
        disks = {str(path): None if gbps is None else float(gbps) for path, gbps in value["disks"].items()}
        threads, memory = int(value["threads"]), float(value["memory_gbps"])
        found = Machine(str(value["processor"]), threads, memory, kernel_gbps, str(value["measured"]), disks)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    speeds = [memory, *kernel_gbps.values(), *(gbps for gbps in disks.values() if gbps is not None)]
    right = sorted(kernel_gbps) == list(WIDTHS) and all(0 < gbps < float("inf") for gbps in speeds)
    return found if right and (found.processor, threads) == (processor(), default_threads()) else None


def mount_of(path: Path) -> str:
    """The mount point of the file system of a path, which need not exist yet."""
    path = path.resolve()
    while not path.exists() or not path.is_mount():
        if path == path.parent:
            break
        path = path.parent
    return str(path)
