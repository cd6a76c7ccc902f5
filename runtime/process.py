"""The cap is the process's: what its container leaves to it, and what the Runtimes that it has leave to one more."""

import gc
import threading
import warnings
import weakref
from typing import TYPE_CHECKING

from .. import _core
from ..devices.probe import cgroup_limit_bytes, memory_limit_bytes, usable_processors
from .plan import resolve_ram

if TYPE_CHECKING:
    from .runtime import Runtime

# The system counts memory by process, so what a cap means to one Runtime depends on all others: these are them.
_runtimes: "weakref.WeakSet[Runtime]" = weakref.WeakSet()
loading = threading.RLock()  # of the one Runtime that is being planned and loaded

CALLER = 3  # frames from warnings.warn() up to whoever makes a Runtime
UNLIMITED = 1 << 62


def process_cap(ram: int | float | str, of: "Runtime | None" = None) -> int:
    """The cap of one more Runtime in bytes, or of one that is open: what was asked for, or less, with a warning that
    says why.

    All Runtimes of a process have the lowest of their caps in common, and no cap is above what the limit of a
    container (a cgroup) leaves: there the system kills.
    """
    if _core.untouched_bytes():
        gc.collect()  # an engine that only a garbage exception's frames still refer to
    asked = cap = resolve_ram(ram)
    taken = _core.resident_bytes()
    left = min(memory_limit_bytes(UNLIMITED) + taken, cgroup_limit_bytes() or UNLIMITED)
    if left < cap:
        cap = left
        warnings.warn(
            f"ram is {_mb(asked)}, but the memory limit of this process's container (cgroup) leaves it {_mb(left)}, "
            "which is its cap now",
            stacklevel=CALLER,
        )
    others = min((runtime.plan.ram_bytes for runtime in open_runtimes() if runtime is not of), default=cap)
    if others < cap:
        if not isinstance(ram, str) or ram.strip().lower() not in ("auto", "max"):
            warnings.warn(
                f"ram is {_mb(asked)}, but another Runtime of this process has a cap of {_mb(others)}, which counts "
                "the memory of both and holds for both; close that one first, or give it a higher cap",
                stacklevel=CALLER,
            )
        cap = others
    return cap


def taken_bytes() -> int:
    """What this process has, and what its open Runtimes are still going to take of what was planned for them."""
    runtimes = open_runtimes()
    on_gpu = sum(runtime.stats["uncounted_bytes"] for runtime in runtimes)
    return _core.resident_bytes() + _core.untouched_bytes() + on_gpu + sum(r.plan.spare_bytes for r in runtimes)


def others_bytes() -> int:
    """What was planned for the open Runtimes of this process, without the interpreter that they share."""
    return sum(r.plan.total_bytes - r.plan.interpreter_bytes + r.plan.spare_bytes for r in open_runtimes())


def open_runtimes() -> "list[Runtime]":
    return [runtime for runtime in _runtimes if runtime.is_open]


def add_runtime(runtime: "Runtime") -> None:
    _runtimes.add(runtime)


def warn_of_threads(threads: int) -> None:
    """Say it where more threads were asked for than can run at once."""
    if threads > (processors := usable_processors()):
        warnings.warn(
            f"threads is {threads}, but this process may use {processors} processor{'s' * (processors > 1)}: more "
            f"threads than that wait for one another and are slower",
            stacklevel=CALLER,
        )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
