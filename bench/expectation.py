"""Predicting the decode speed of a plan: the weights of a token at the kernels' speed, plus its misses at the disk's.

The two times add up: decoding under caps has 0.93 to 1.08 of the predicted speed (bench/reports/cpu.md). Attention to a
long context is neglected, so the speed is that at the beginning of a context.
"""

from dataclasses import asdict, dataclass

import numpy as np

from ..compressor.choosing.estimate import Estimate
from .machine import Machine

LAYER_S = 40e-6  # overhead of a layer: norms, routing, and starting and joining threads
# Of 14 runs recorded on a quiet machine (tests/test_expectation.py has them), the slowest, at the floor, had 0.75 of
# the speed expected from kernels and disk measured in the same report, the fastest 1.34.
LEAST, MOST = 0.7, 1.4
# If the frequencies of experts are not known, uniform use is assumed, which is the worst case. These are the hit rates
# of the embedded model on text of five kinds (bench/reports/cache_policies.md).
SHARES, HITS_IN_TEXT = (0.0, 0.3, 0.5, 0.7, 1.0), (0.0, 0.53, 0.79, 0.94, 1.0)


@dataclass(frozen=True, slots=True)
class Speed:
    """The expected tokens a second, with bounds from the ratios of measured to expected speed."""

    tokens_per_second: float
    low: float
    high: float
    resident_tokens_per_second: float  # with every expert in memory
    weight_bytes_per_token: int  # used for computing
    read_bytes_per_token: int  # of these, read from storage
    hit_rate: float
    disk_gbps: float | None  # None if nothing is read
    measured: str  # the day when the bandwidths were measured

    def as_dict(self) -> dict:
        return asdict(self)


def expected_speed(estimate: Estimate, machine: Machine, disk_gbps: float | None) -> Speed | None:
    """The speed of an estimate's plan; None if it reads from a disk of unknown speed or is below its floor."""
    plan = estimate.plan
    missed = 0 if plan.resident else round((1 - estimate.hit_rate) * plan.working_set_bytes)
    if plan.ram_bytes < plan.floor_bytes or (missed and not disk_gbps):
        return None
    compute = (
        estimate.trunk_read_bytes / machine.weights_gbps(estimate.trunk_bits) / 1e9
        + plan.working_set_bytes / machine.weights_gbps(estimate.bits) / 1e9
        + estimate.layers * LAYER_S
    )

    def tps(read_bytes: float) -> float:
        return 1 / (compute + (read_bytes / disk_gbps / 1e9 if read_bytes else 0))

    share = plan.experts_bytes / plan.all_experts_bytes
    hits = estimate.hit_rate if estimate.calibrated else float(np.interp(share, SHARES, HITS_IN_TEXT))
    return Speed(
        tokens_per_second=tps(missed),
        low=LEAST * tps(missed),
        high=MOST * tps(0 if plan.resident else (1 - hits) * plan.working_set_bytes),
        resident_tokens_per_second=tps(0),
        weight_bytes_per_token=estimate.trunk_read_bytes + plan.working_set_bytes,
        read_bytes_per_token=missed,
        hit_rate=1.0 if plan.resident else estimate.hit_rate,
        disk_gbps=disk_gbps if missed else None,
        measured=machine.measured,
    )
