"""Compares decoding under a cap with the disk's bound: 1 / (compute + missed bytes / bandwidth of the disk).

Compute is the time of a token with every expert in memory. The bandwidth is that of unbuffered reads of the same
records, measured between the rounds by the same process, as that of a shared disk changes from second to second.
Reading while a layer is computed can exceed this bound; waiting for one record at a time stays below it.

    python -m bench.laboratory.paging_bound JSON     # one cap; called by paging_bound()
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe.bench.bandwidth import disk_read_gbps
from edge_moe.bench.bench import generate_run
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.child import answer, call
from edge_moe.runtime.plan import READERS
from edge_moe.runtime.runtime import Runtime

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # position of the cap between the floor and every expert in memory
TOKENS, ROUNDS = 32, 5
SPARE = 4_000_000  # above the floor, for the variation of a process's memory between starts


@dataclass(frozen=True, slots=True)
class AtCap:
    """Decoding under one cap; lists have one value per round."""

    ram_bytes: int
    slots: int  # 0: every expert in memory
    hit_rate: float
    read_bytes_per_token: float
    peak_memory_bytes: int
    tps: list[float]
    disk_gbps: list[float]
    share: float | None  # of the bound; None if nothing was read


def paging_bound(bundle: str | Path) -> list[AtCap]:
    """Measure at caps from the floor to every expert in memory, each in its own process."""
    whole = _at(bundle, 10**15)
    floor, resident = whole["floor_bytes"] + SPARE, whole["resident_bytes"] + SPARE
    rows = [_at(bundle, int(floor + share * (resident - floor))) for share in SHARES]
    compute = 1 / statistics.median(whole["tps"])
    return [_row(its, compute) for its in rows]


def _row(its: dict, compute: float) -> AtCap:
    """compute: seconds of a token that reads nothing."""
    bounds = [compute + read / (gbps * 1e9) for read, gbps in zip(its["read"], its["disk_gbps"], strict=True)]
    share = (
        statistics.median(tps * bound for tps, bound in zip(its["tps"], bounds, strict=True)) if its["slots"] else None
    )
    return AtCap(
        **{key: its[key] for key in ("ram_bytes", "slots", "hit_rate", "peak_memory_bytes", "tps", "disk_gbps")},
        read_bytes_per_token=statistics.mean(its["read"]),
        share=share,
    )


def _at(bundle: str | Path, cap: int) -> dict:
    return call("bench.laboratory.paging_bound", {"bundle": str(bundle), "cap": cap}, "measuring a cap was killed")


def _measure(bundle: str, cap: int) -> dict:
    """In the child process: rounds of decoding, each followed by one of reading, whose buffers count under the cap."""
    opened = Bundle.open(bundle)
    buffers = READERS * max(expert.nbytes for expert in opened.experts.values())
    with Runtime(bundle, cap - buffers, 2 * TOKENS) as runtime:
        ids = np.random.default_rng(0).integers(0, runtime.config.vocab, (ROUNDS + 1, TOKENS)).tolist()
        tps, read, disk, used = [], [], [], []
        for number, tokens in enumerate(ids):
            before, began = runtime.stats, time.perf_counter()
            generate_run(runtime, tokens, None)
            seconds = time.perf_counter() - began
            if number == 0:  # warm-up
                continue
            now = runtime.stats
            used.append([now[key] - before[key] for key in ("expert_hits", "expert_misses")])
            read.append((now["bytes_read"] - before["bytes_read"]) / TOKENS)
            tps.append(TOKENS / seconds)
            disk.append(disk_read_gbps(opened) or float("nan"))
        hits, misses = np.sum(used, axis=0).tolist()
        plan = runtime.plan
        return {
            "ram_bytes": cap,
            "floor_bytes": plan.floor_bytes + buffers,
            "resident_bytes": plan.resident_bytes + buffers,
            "slots": plan.slots,
            "hit_rate": hits / (hits + misses),
            "peak_memory_bytes": runtime.stats["peak_memory_bytes"],
            "tps": tps,
            "read": read,
            "disk_gbps": disk,
        }


if __name__ == "__main__":
    answer(_measure)
