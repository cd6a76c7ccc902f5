"""A Runtime whose cap is a size, follows the machine, or is a part of one that several processes share."""

from collections.abc import Callable

from .runtime.plan import BelowFloor, resolve_ram
from .runtime.ram_share import RamShare
from .runtime.runtime import Runtime
from .user_files import cache_directory

NO_CAP = 1_000_000  # below every floor, which the refusal tells
SPARE = 16_000_000  # bytes beyond the floor, as Python grows


def capped(ram: str, share: str | None, make: Callable[[int | str], Runtime], tell: Callable[[str], None]) -> Runtime:
    """Make a Runtime under `ram`, of which it has its part if processes share that.

    share: the share's name, or None. make: makes the Runtime for a cap. tell: called with each change of the cap and
    its reason, from a thread. Raises what make() raises, MemoryError if a share has no room, and ValueError.
    """
    if share is None:
        runtime = make(ram)
        if ram == "auto":
            runtime.follow_memory(tell)
        return runtime
    its = RamShare(share, resolve_ram(ram), cache_directory() / "shares")
    try:
        make(NO_CAP).close()
        raise AssertionError("a megabyte is below every floor")
    except BelowFloor as refused:
        floor = refused.plan.floor_bytes + SPARE
    cap = its.join(floor, tell=tell)
    try:
        runtime = make(cap)
    except BaseException:
        its.leave()
        raise
    runtime.follow_share(its, tell)
    return runtime
