"""A cap that follows the machine: it is lowered while other programs need memory, and raised again when they do not.

Three things tell that they need it: the memory that the system, or this process's container, could still give is less
than a reserve; programs wait for memory (Linux's pressure stall information); macOS says that memory is short. The
cap is then lowered at once, by as much as is missing, down to the floor. When there has been nothing of this for a
while, it is raised in small steps, up to what it was at first. Results do not depend on it.
"""

import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .. import _core
from ..devices.probe import memory_limit_bytes
from .plan import BelowFloor
from .plan_table import size
from .ram_share import RamShare

if TYPE_CHECKING:
    from .runtime import Runtime

LOOK_S = 1.0  # between two looks
QUIET_S = 15.0  # without a change or a need before the cap is raised
AGAIN_S = 5.0  # before stalls, which are means of ten seconds, lower the cap again
STALLED = 10.0  # percent of time in which some program waits for memory
CALM = 1.0  # below which the cap may be raised
LEAST_RESERVE, MOST_RESERVE = 64_000_000, 1_000_000_000
PARTS = 16  # of the first cap: the reserve, and the step by which it is raised
PARTS_MLX = 4  # as a new size of MLX's memory for experts is new memory, into which they are read again
LEAST_CHANGE = 4_000_000  # bytes of a part of a share that are worth a change
PRESSURE = "/proc/pressure/memory"
WARNING = 2  # of macOS's levels: 1 normal, 2 warning, 4 critical


class Memory(NamedTuple):
    """What the system says of its memory."""

    available: int  # bytes that it could give to programs, without those that this process has planned and not taken
    stalled: float  # percent of the last ten seconds in which some program waited for memory; 0 if not known
    level: int  # of macOS; 1 elsewhere


def memory_now() -> Memory:
    available = memory_limit_bytes(_core.free_bytes()) - _core.untouched_bytes()
    return Memory(available, _stalled(PRESSURE), _level())


class CapWatch:
    """Changes the cap of a Runtime from a thread of its own, until the Runtime is closed.

    tell: called with a sentence for each change, from that thread.
    """

    every_s: float  # between two looks

    def __init__(self, runtime: "Runtime", tell: Callable[[str], None] = lambda line: None):
        self._weakly, self._tell = weakref.ref(runtime), tell
        self._stop = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="edge-moe-cap", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def act(self) -> str | None:
        """Change the cap if it should be changed, and return what was done and why.

        Raises ValueError if the Runtime is closed."""
        raise NotImplementedError

    def _runtime(self) -> "Runtime":
        runtime = self._weakly()
        if runtime is None or not runtime.is_open:
            raise ValueError("this Runtime is closed")
        return runtime

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            try:
                said = self.act()
            except ValueError:  # the Runtime was closed meanwhile
                return
            if said:
                self._tell(said)


class ElasticCap(CapWatch):
    """Follows what the machine says of its memory."""

    def __init__(self, runtime: "Runtime", tell: Callable[[str], None] = lambda line: None):
        super().__init__(runtime, tell)
        self.every_s = LOOK_S
        self.most = runtime.plan.ram_bytes
        self.step = self.most // (PARTS_MLX if runtime.device == "mlx" else PARTS)
        self.reserve = min(max(self.most // PARTS, LEAST_RESERVE), MOST_RESERVE)
        self._changed = self._quiet_since = time.monotonic()

    def act(self) -> str | None:
        return self.look(time.monotonic(), memory_now())

    def look(self, now: float, memory: Memory) -> str | None:
        """Change the cap if it should be changed, and return what was done and why.

        Raises ValueError if the Runtime is closed."""
        runtime = self._runtime()
        cap = runtime.plan.ram_bytes
        missing, why = self._missing(now, memory)
        if missing > 0:
            self._quiet_since = now
            return self._lower(runtime, cap, missing, why, now)
        wanted = min(self.step, self.most - cap)
        step = min(wanted, memory.available - self.reserve)
        if now - self._quiet_since < QUIET_S or memory.stalled >= CALM or step < max(wanted // 4, 1):
            return None
        self._changed = self._quiet_since = now
        plan = runtime.change_cap(cap + step)
        return f"cap raised from {size(cap)} to {size(plan.ram_bytes)}: {size(memory.available)} of memory are free"

    def _missing(self, now: float, memory: Memory) -> tuple[int, str]:
        """How many bytes others need, and what says so."""
        if memory.available < self.reserve:
            free = size(max(memory.available, 0))
            return self.reserve - memory.available, f"{free} of memory are free, of {size(self.reserve)} to be left"
        if now - self._changed < AGAIN_S:
            return 0, ""
        if memory.stalled >= STALLED:
            return self.most // 8, f"programs waited for memory {memory.stalled:.0f}% of the last ten seconds"
        if memory.level >= WARNING:
            return self.most // 8, "macOS says that memory is short"
        return 0, ""

    def _lower(self, runtime: "Runtime", cap: int, missing: int, why: str, now: float) -> str | None:
        try:
            plan = runtime.change_cap(max(cap - max(missing, self.step // 4), 1_000_000))
        except BelowFloor as refused:
            if cap <= refused.plan.floor_bytes:
                return None
            plan = runtime.change_cap(refused.plan.floor_bytes)
        self._changed = now
        return f"cap lowered from {size(cap)} to {size(plan.ram_bytes)}: {why}"


class SharedCap(CapWatch):
    """Follows the Runtime's part of a share."""

    def __init__(self, runtime: "Runtime", share: RamShare, tell: Callable[[str], None] = lambda line: None):
        super().__init__(runtime, tell)
        self.every_s = LOOK_S / 2
        self._share = share

    def stop(self) -> None:
        super().stop()
        self._share.leave()

    def act(self) -> str | None:
        try:
            return self._look()
        except OSError as error:  # of the file; the cap stays
            return f"the share's file: {error}"

    def _look(self) -> str | None:
        runtime = self._runtime()
        cap, floor = runtime.plan.ram_bytes, runtime.plan.floor_bytes
        wanted = self._share.look(floor, cap)
        if abs(wanted - cap) < LEAST_CHANGE:
            self._share.changed(cap)
            return None
        try:
            plan = runtime.change_cap(wanted)
        except BelowFloor as refused:  # Python has grown meanwhile
            plan = runtime.change_cap(refused.plan.floor_bytes)
        self._share.changed(plan.ram_bytes)
        return f"cap {size(cap)} is now {size(plan.ram_bytes)}: its part of the share {self._share.name}"


def _stalled(file: str) -> float:
    """The share of time by a file like `some avg10=0.12 avg60=...`, in percent; 0 without one."""
    try:
        line = Path(file).read_text().splitlines()[0]
        return float(line.split("avg10=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 0.0


def _level() -> int:
    if sys.platform != "darwin":
        return 1
    import ctypes

    level, length = ctypes.c_int(1), ctypes.c_size_t(4)
    libc = ctypes.CDLL(None)
    libc.sysctlbyname(b"kern.memorystatus_vm_pressure_level", ctypes.byref(level), ctypes.byref(length), None, 0)
    return level.value
