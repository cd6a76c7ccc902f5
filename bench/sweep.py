"""Measuring a bundle's speed at several caps, from its floor to every expert in memory, and finding the knee.

Each cap has its own process, because peak memory is per process. The first of these processes reports the floor: the
memory of its imports counts, so the plan of another process would differ. Below the knee the slots cannot hold the
experts that one token uses in all layers, so every token reads from storage, whatever is evicted.

    python -m edge_moe.bench.sweep JSON     # one cap; called by sweep()
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..devices.probe import default_threads
from ..runtime.bundle import Bundle
from ..runtime.child import answer, call
from ..runtime.device import device_name
from ..runtime.engine_config import engine_memory
from ..runtime.plan import CHUNKS, LEAST_BYTES, BelowFloor, Plan, resolve_ram
from .bench import Measurement, measure

CAPS = 6
MARGIN = 1_000_000  # upper bound of the variation of the interpreter's memory between starts


@dataclass(frozen=True, slots=True)
class Sweep:
    """The rows of all caps, the lowest cap first; caps in bytes."""

    rows: list[Measurement]
    floor_bytes: int
    knee_bytes: int  # the smallest cap at which the slots hold a token's working set
    resident_bytes: int
    working_set_experts: int
    working_set_bytes: int

    def as_dict(self) -> dict:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}


def sweep(
    bundle: str | Path,
    *,
    ram: int | str = "auto",
    caps: int = CAPS,
    progress: Callable[[str, int, int], None] | None = None,
    **options,
) -> Sweep:
    """Measure a bundle at `caps` caps, evenly spaced from its floor to every expert in memory or to `ram`.

    The last cap also allows the longest steps of prefill. options: as for measure(), from prompt to prune. Raises
    ValueError for fewer than two caps, MemoryError for a `ram` below the floor, and what measure() raises.
    """
    if caps < 2:
        raise ValueError(f"a sweep of {caps} caps is too short, expected at least 2")
    given = {"bundle": str(bundle), **options}
    least = Plan(**_at(LEAST_BYTES, given)["refused"])
    lowest, highest = least.floor_bytes + MARGIN, min(_whole_bytes(bundle, least, options), resolve_ram(ram))
    if highest < lowest:
        raise BelowFloor(replace(least, ram_bytes=highest, floor_bytes=lowest))
    rows = []
    for step in range(caps):
        measured = _at(lowest + (highest - lowest) * step // (caps - 1), given)
        if "refused" in measured:  # this process started with more memory than the first
            measured = _at(measured["refused"]["floor_bytes"] + MARGIN, given)
        rows += [Measurement(**row) for row in measured["rows"]]
        if progress:
            progress("caps", step + 1, caps)
    return Sweep(
        rows=rows,
        floor_bytes=least.floor_bytes,
        knee_bytes=least.working_set_cap_bytes,
        resident_bytes=least.resident_bytes,
        working_set_experts=least.working_set_experts,
        working_set_bytes=least.working_set_bytes,
    )


def _whole_bytes(bundle: str | Path, least: Plan, options: dict) -> int:
    """The cap at which every expert is in memory and the steps of prefill are longest."""
    threads, step = options.get("threads") or default_threads(), min(CHUNKS[0], least.context)
    device = device_name(options.get("device", "auto"))
    *_, scratch = engine_memory(
        Bundle.open(bundle).config, least.context, step, device, least.slot_bytes, threads=threads
    )
    return least.resident_bytes + scratch - least.scratch_bytes + MARGIN


def _at(cap: int, given: dict) -> dict:
    killed = f"measuring at a cap of {cap / 1e6:,.0f} MB was killed; the machine may have less memory than that"
    return call("edge_moe.bench.sweep", {"ram": cap, **given}, killed)


def _measure(bundle: str, ram: int, **options) -> dict:
    """In the child process: measure the rows at one cap; below the floor, return the plan instead."""
    try:
        rows, _ = measure(bundle, ram=ram, **options)
    except BelowFloor as refused:
        return {"refused": asdict(refused.plan)}
    return {"rows": [asdict(row) for row in rows]}


if __name__ == "__main__":
    answer(_measure)
