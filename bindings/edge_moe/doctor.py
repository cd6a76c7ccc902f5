"""`edge-moe doctor`: examines this machine's hardware and read speeds, and estimates the speed of known models here."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from . import __version__, _core
from .bench import CONFIGS
from .bench.expectation import expected_speed
from .bench.machine import measure_machine, mount_of
from .compressor.choosing.estimate import estimate
from .devices.nvidia import find_driver, nvcc_version
from .devices.probe import cgroup_limit_bytes, default_threads, memory_limit_bytes
from .machine_file import known_machine, remember_machine
from .runtime.child import call
from .runtime.device import device_name, mlx_version
from .runtime.plan_table import size, table

MODELS = {"Qwen3-30B-A3B": "qwen3-30b-a3b", "Qwen3-235B-A22B": "qwen3-235b-a22b", "DeepSeek-V3": "deepseek-v3"}
BITS = 2.5  # of MODELS: the default of compress
SMALL_CAP = 8_000_000_000  # a second cap for the smallest of MODELS


def examine(where: str | Path = ".", progress: Callable[[str, int, int], None] | None = None) -> dict:
    """The object that `edge-moe doctor --json` prints. where: a bundle, or the directory that will hold one.

    Writes, reads and removes a file of 268 MB if `where` is not a bundle. The measurements are kept for `edge-moe
    plan`. progress(step, done, of) is called before each measurement. Raises OSError if `where` is not writable.
    """
    where = Path(where)
    if not where.is_dir():
        what = "is a file" if where.exists() else "no such directory"
        raise FileNotFoundError(f"{where}: {what}; name a bundle, or the directory that will hold one")
    threads, driver, steps = default_threads(), find_driver(), ["memory", "kernels", "disk"]

    def tell(step: str) -> None:
        if progress:
            progress(f"measuring the {step}", steps.index(step), len(steps))

    try:
        machine = measure_machine(where, known_machine(), tell)
    except OSError as error:
        raise OSError(f"{where}: nothing can be written here ({error.strerror}); name another directory") from None
    remember_machine(machine)
    disk_gbps = machine.disks[mount_of(where)]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit_bytes()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": machine.processor,
        "threads": threads,
        "kernels": _core.kernel_names(),
        "memory_bytes": memory,
        "available_bytes": memory_limit_bytes(_core.free_bytes()),
        "cgroup_limit_bytes": limit if limit and limit < memory else None,
        "memory_gbps": machine.memory_gbps,
        "kernel_gbps": machine.as_dict()["kernel_gbps"],
        "disk": {"path": str(where.resolve()), "gbps": disk_gbps},
        "cuda": {
            "driver": driver.version if driver else None,
            "gpus": [asdict(gpu) for gpu in driver.gpus] if driver else [],
            "nvcc": nvcc_version(),
            "build": _core.cuda_build() == "cuda",  # whether this build has code for them
        },
        "mlx": _mlx(),
        "devices": list(dict.fromkeys([device_name("auto"), "cpu"])),  # the default first
        "models": _models(machine, disk_gbps),
    }


def _mlx() -> dict:
    """What MLX has here, if it is installed; "error" if it does not work."""
    if not mlx_version():
        return {"version": None}
    try:
        return call("edge_moe.runtime.mlx.check", {}, "MLX ended the process that imported it")
    except (ValueError, OSError, MemoryError) as error:
        return {"version": mlx_version(), "error": str(error)}


def _models(machine, disk_gbps: float | None) -> list[dict]:
    """Size and speed of known models at BITS with `--ram auto`, and of the smallest also under SMALL_CAP."""
    found = []
    for name, config in MODELS.items():
        caps = ["auto", *([SMALL_CAP] if not found else [])]
        for made in (estimate(CONFIGS / f"{config}.json", cap, bits=BITS) for cap in caps):
            plan, speed = made.plan, expected_speed(made, machine, disk_gbps)
            found.append(
                {
                    "model": name,
                    "bits": BITS,
                    "ram_bytes": plan.ram_bytes,
                    "disk_bytes": made.disk_bytes,
                    "floor_bytes": plan.floor_bytes,
                    "share_in_memory": plan.experts_bytes / plan.all_experts_bytes,
                    "expected_speed": speed and speed.as_dict(),
                }
            )
    return found


def examination_text(found: dict) -> str:
    """Format the result of examine() as text."""
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
        ["", f"reads {found['memory_gbps']:.1f} GB/s on all threads, {_kernels_text(found)} as weights"],
        ["disk", f"{disk['path']}: " + _disk_text(disk["gbps"])],
        *[["GPU" if number == 0 else "", line] for number, line in enumerate(gpus)],
        ["CUDA", f"driver for {cuda['driver']}{toolkit}" if cuda["driver"] else f"no driver{toolkit}"],
        ["MLX", _mlx_text(found["mlx"])],
        ["runs on", _devices_text(found)],
    ]
    so = "\n".join(f"  {_model_text(model)}" for model in found["models"])
    return f"{table(rows)}\n\nso, at {BITS:g} bits an expert weight, as `edge-moe compress` makes them:\n{so}"


def _model_text(its: dict) -> str:
    """One line about a known model."""
    name, cap, speed = f"{its['model']} ({size(its['disk_bytes'])})", size(its["ram_bytes"]), its["expected_speed"]
    if its["ram_bytes"] < its["floor_bytes"]:
        return f"{name} under {cap}: does not run; it needs {size(its['floor_bytes'])}"
    share = its["share_in_memory"]
    held = "every expert fits" if share == 1 else f"{share:.0%} of experts fit"
    tps = f", about {speed['tokens_per_second']:.2g} tok/s" if speed else ""
    return f"{name} under {cap}: {held}{tps}"


def _kernels_text(found: dict) -> str:
    speeds = found["kernel_gbps"].values()
    return f"{min(speeds):.1f} to {max(speeds):.1f}"


def _devices_text(found: dict) -> str:
    cuda = found["cuda"]
    if cuda["gpus"] and not cuda["build"]:
        return "cpu; this build has no code for the GPU: pip install -Ccmake.define.EDGE_MOE_CUDA=ON, where nvcc is"
    unused = found["system"].startswith("Darwin") and "mlx" not in found["devices"]
    return " or ".join(found["devices"]) + ("; for a Mac's GPU: pip install 'edge-moe[mlx]'" if unused else "")


def _mlx_text(its: dict) -> str:
    if not its["version"]:
        return "not installed"
    if "error" in its:
        return f"{its['version']}, which does not work: {its['error']}"
    where = (
        f"Metal on {its['device']}" if its["metal"] else f"no Metal: it would compute on the processor, {its['device']}"
    )
    return f"{its['version']}, {where}; kernels {its['kernels']}"


def _disk_text(gbps: float | None) -> str:
    if gbps is None:
        return "refuses unbuffered reads; a model that is larger than its cap would be read through the page cache"
    return f"unbuffered reads {gbps:.2f} GB/s"
