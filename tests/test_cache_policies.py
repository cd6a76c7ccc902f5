"""Simulated caches: by hand, and LFRU as the engine does it."""

import numpy as np
import pytest
from bundles import REFERENCE

from bench.laboratory.cache_policies import HALF_LIFE, LFRU, LFU, LRU, SHARES, Belady, Static, hits, record, table
from edge_moe.bench.bench import generate_run
from edge_moe.bench.evaluate import Cached
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.config_file import load_config
from edge_moe.runtime.runtime import Runtime

NONE = np.zeros(8)


def steps(text: str) -> list[list[int]]:
    return [[int(digit)] for digit in text]


def test_policies_by_hand():
    trace = steps("0102030401020304")
    assert hits(trace, 2, LRU()) == 7  # 0 stays, as it is used every other time
    assert hits(steps("0120120"), 2, LRU()) == 0
    assert hits(steps("0120120"), 2, Belady(steps("0120120"))) == 2  # 2 takes 1's place, then 1 takes 0's
    assert hits(steps("0001212"), 2, LFU()) == 2  # 1 and 2 throw each other out, 0 stays
    assert hits(steps("0001212"), 2, LFRU(NONE, 1)) == 4
    assert hits(steps("0001212"), 2, LFRU(NONE, 1000)) == 2
    assert hits(steps("1230123"), 2, Static(pinned=frozenset({1}))) == 1


def test_what_a_step_needs_stays_for_the_rest_of_it():
    assert hits([[0, 1], [2, 0], [2, 0]], 2, LRU()) == 3


def test_nothing_is_above_the_optimum():
    rng = np.random.default_rng(0)
    trace = [sorted(rng.choice(8, 2, replace=False, p=np.arange(1, 9) / 36).tolist()) for _ in range(300)]
    for slots in (2, 4, 6):
        best = hits(trace, slots, Belady(trace))
        for policy in (LRU(), LFU(), LFRU(NONE, 20), Static(pinned=frozenset(range(8 - slots + 2, 8)))):
            assert hits(trace, slots, policy) <= best


def test_lfru_is_the_engines(bundle_of, stdlib_ids):
    """Token by token, the engine finds in memory what the simulation does."""
    ids, config = stdlib_ids[:160], load_config(REFERENCE)
    path = bundle_of("reference", bits=16)
    with Runtime(path, "8GB", 256) as whole:
        plan = whole.plan
    cap = plan.floor_bytes + (plan.resident_bytes - plan.floor_bytes) // 2
    with Runtime(path, cap, 256, prune="off") as runtime:
        slots = runtime.plan.slots
        assert 8 < slots < 56
        runtime._engine.set_prefetch(False)
        generate_run(runtime, ids, "off")
        found = runtime.stats
    with Checkpoint(REFERENCE) as checkpoint:
        trace = record(config, Cached(checkpoint), np.array(ids))
    policy = LFRU(np.zeros(64), HALF_LIFE * config.layer_count)
    uses = found["expert_hits"] + found["expert_misses"]
    assert uses == sum(map(len, trace))
    assert found["expert_hits"] == pytest.approx(
        hits(trace, slots, policy), abs=0.005 * uses
    )  # a tie may be routed otherwise


def test_a_table_has_every_policy_at_every_size():
    rng, config = np.random.default_rng(0), load_config(REFERENCE)
    trace = [sorted((16 * (i % 4) + rng.choice(16, 4, replace=False)).tolist()) for i in range(80)]
    lines = table(trace, rng.random(64), config).splitlines()
    assert len(lines) == 2 + 7
    assert all(line.count("%") == len(SHARES) for line in lines[2:])
