"""Caps of a process: a cap holds for all of its Runtimes together, and cannot exceed the limit of its container."""

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

# The system counts memory by process, so the cap of one Runtime depends on all others, which are registered here.
_runtimes: "weakref.WeakSet[Runtime]" = weakref.WeakSet()
loading = threading.RLock()  # held while a Runtime is planned and loaded, one at a time

CALLER = 3  # stack frames from warnings.warn() up to the code that makes a Runtime
UNLIMITED = 1 << 62


def process_cap(ram: int | float | str, of: "Runtime | None" = None) -> int:
    """The cap in bytes of a new Runtime, or of the open one `of`: as asked for, or less with a warning that says why.

    All Runtimes of a process share the lowest of their caps, and no cap exceeds what the limit of a container (a
    cgroup) leaves, as the system would kill the process there.
    """
    if _core.untouched_bytes():
        gc.collect()  # frees an engine that only the frames of a garbage exception refer to
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
    """The memory of this process, plus the memory planned for its open Runtimes that they have not taken yet."""
    runtimes = open_runtimes()
    on_gpu = sum(runtime.stats["uncounted_bytes"] for runtime in runtimes)
    return _core.resident_bytes() + _core.untouched_bytes() + on_gpu + sum(r.plan.spare_bytes for r in runtimes)


def others_bytes() -> int:
    """The memory planned for the open Runtimes of this process, without the interpreter, which they share."""
    return sum(r.plan.total_bytes - r.plan.interpreter_bytes + r.plan.spare_bytes for r in open_runtimes())


def open_runtimes() -> "list[Runtime]":
    return [runtime for runtime in _runtimes if runtime.is_open]


def add_runtime(runtime: "Runtime") -> None:
    _runtimes.add(runtime)


def warn_of_threads(threads: int) -> None:
    """Warn if more threads were asked for than can run at once."""
    if threads > (processors := usable_processors()):
        warnings.warn(
            f"threads is {threads}, but this process may use {processors} processor{'s' * (processors > 1)}: more "
            f"threads than that wait for one another and are slower",
            stacklevel=CALLER,
        )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
