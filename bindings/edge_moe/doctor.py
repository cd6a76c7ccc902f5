"""`edge-moe doctor`: what this machine has, how fast it reads, and what would compute a model here."""

import importlib.util
import os
import platform
from dataclasses import asdict
from pathlib import Path

from edge_moe import __version__, _core
from edge_moe.bench.bandwidth import directory_read_gbps, disk_read_gbps, memory_read_gbps
from edge_moe.bench.conditions import processor
from edge_moe.devices.nvidia import find_driver, nvcc_version
from edge_moe.devices.probe import cgroup_limit_bytes, default_threads, memory_limit_bytes
from edge_moe.report import size, table
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.device import device_name


def examine(where: Path) -> dict:
    """What `edge-moe doctor --json` prints. where: a bundle, or the directory that will hold one.

    Writes, reads and removes a file of 268 MB when `where` is not a bundle. Raises OSError where that cannot be done.
    """
    if not where.is_dir():
        raise FileNotFoundError(f"{where}: no such directory; name a bundle, or the directory that will hold one")
    threads, driver = default_threads(), find_driver()
    is_bundle = (where / "bundle.json").exists()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit_bytes()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": processor(),
        "threads": threads,
        "kernels": _core.kernel_names(),
        "memory_bytes": memory,
        "available_bytes": memory_limit_bytes(_core.free_bytes()),
        "cgroup_limit_bytes": limit if limit and limit < memory else None,
        "memory_gbps": memory_read_gbps(threads),
        "disk": {
            "path": str(where.resolve()),
            "gbps": disk_read_gbps(Bundle.open(where)) if is_bundle else directory_read_gbps(where),
        },
        "cuda": {
            "driver": driver.version if driver else None,
            "gpus": [asdict(gpu) for gpu in driver.gpus] if driver else [],
            "nvcc": nvcc_version(),
            "build": _core.cuda_build() == "cuda",  # has this build code for them?
        },
        "mlx": importlib.util.find_spec("mlx") is not None,
        "devices": list(dict.fromkeys([device_name("auto"), "cpu"])),  # the default first
    }


def examination_text(found: dict) -> str:
    """The same as lines of text."""
    limit, disk, cuda = found["cgroup_limit_bytes"], found["disk"], found["cuda"]
    gpus = [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors, "
        f"{size(gpu['memory_bytes'])} {'shared with the processor' if gpu['integrated'] else 'of its own'}"
        for gpu in cuda["gpus"]
    ]
    toolkit = f"; toolkit {cuda['nvcc']}" if cuda["nvcc"] else ""
    rows = [
        ["edge-moe", f"{found['version']} on Python {found['python']}"],
        ["system", found["system"]],
        ["processor", f"{found['processor']}, {found['threads']} threads, kernels {found['kernels'][0]}"],
        ["memory", f"{size(found['memory_bytes'])}, {size(found['available_bytes'])} available"],
        *([["", f"a cgroup limits it to {size(limit)}"]] if limit else []),
        ["", f"reads {found['memory_gbps']:.1f} GB/s on all threads"],
        ["disk", f"{disk['path']}: " + _disk_text(disk["gbps"])],
        *[["GPU" if number == 0 else "", line] for number, line in enumerate(gpus)],
        ["CUDA", f"driver for {cuda['driver']}{toolkit}" if cuda["driver"] else f"no driver{toolkit}"],
        ["MLX", "installed" if found["mlx"] else "not installed"],
        ["runs on", _devices_text(found)],
    ]
    return table(rows)


def _devices_text(found: dict) -> str:
    cuda = found["cuda"]
    if cuda["gpus"] and not cuda["build"]:
        return "cpu; this build has no code for the GPU: pip install -Ccmake.define.EDGE_MOE_CUDA=ON, where nvcc is"
    return " or ".join(found["devices"])


def _disk_text(gbps: float | None) -> str:
    if gbps is None:
        return "refuses unbuffered reads; a model that is larger than its cap would be read through the page cache"
    return f"unbuffered reads {gbps:.2f} GB/s"
