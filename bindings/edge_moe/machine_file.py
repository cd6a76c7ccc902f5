"""Storing the measured speed of this machine in the user's cache directory, for `edge-moe plan`."""

import json
import os
from contextlib import suppress
from pathlib import Path

from .bench.machine import Machine, machine_of, mount_of
from .user_files import cache_directory

NAME = "machine.json"


def known_machine() -> Machine | None:
    """The stored measurements; None if there are none or they are of another machine."""
    try:
        return machine_of(json.loads((cache_directory() / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def remember_machine(machine: Machine) -> None:
    """Store the measurements; does nothing if the directory is not writable."""
    with suppress(OSError):
        path = cache_directory() / NAME
        temporary = path.with_name(f"{NAME}.{os.getpid()}")
        temporary.write_text(json.dumps(machine.as_dict()) + "\n", encoding="utf-8")
        temporary.replace(path)


def disk_of(machine: Machine, where: Path) -> tuple[float | None, str]:
    """GB/s and mount point of the disk of `where` or, if that was not measured, of the disk measured last."""
    mount = mount_of(where)
    mount = mount if mount in machine.disks else list(machine.disks)[-1]
    return machine.disks[mount], mount
