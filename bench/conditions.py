"""The conditions of a measurement: the processor, the time that other machines took of it, and time by step."""

import os
import platform
import time
from pathlib import Path


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def stolen() -> float:
    """Seconds since boot that a hypervisor withheld from this machine's cores (steal time); 0 if not known."""
    file = Path("/proc/stat")
    return int(file.read_text().split()[8]) / os.sysconf("SC_CLK_TCK") if file.exists() else 0.0


def busy_seconds() -> float:
    """Seconds since boot that all cores together were busy or withheld by a hypervisor; 0 if not known."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    user, nice, system, _, _, interrupts, soft, kept = map(int, file.read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + kept) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    """CPU seconds on all cores that a process has used; 0 if not known."""
    file = Path(f"/proc/{pid}/stat")
    if not file.exists():
        return 0.0
    user, system = file.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def timed(progress, took: dict[str, float]):
    """Wrap progress(step, done, of), which may be None, so that it also adds each step's seconds to `took`."""
    last = time.perf_counter()

    def tell(step: str, done: int, of: int) -> None:
        nonlocal last
        now = time.perf_counter()
        took[step] = took.get(step, 0.0) + now - last
        last = now
        if progress:
            progress(step, done, of)

    return tell
