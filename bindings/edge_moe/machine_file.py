"""How fast this machine was found to be, kept for `edge-moe plan` in the user's cache directory."""

import json
import os
from contextlib import suppress
from pathlib import Path

from .bench.machine import Machine, machine_of, mount_of
from .user_files import cache_directory

NAME = "machine.json"


def known_machine() -> Machine | None:
    """What was measured here before; None where nothing was, or on another machine."""
    try:
        return machine_of(json.loads((cache_directory() / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def remember_machine(machine: Machine) -> None:
    """Keep it for the next time; where that cannot be done nothing is kept."""
    with suppress(OSError):
        path = cache_directory() / NAME
        temporary = path.with_name(f"{NAME}.{os.getpid()}")
        temporary.write_text(json.dumps(machine.as_dict()) + "\n", encoding="utf-8")
        temporary.replace(path)


def disk_of(machine: Machine, where: Path) -> tuple[float | None, str]:
    """GB/s of the disk that a path is on and its mount point; of the one measured last where it was not measured."""
    mount = mount_of(where)
    mount = mount if mount in machine.disks else list(machine.disks)[-1]
    return machine.disks[mount], mount
