"""What a sequence knows is written and read again: in another engine, of other sizes, it goes on with the same bits."""

import numpy as np
import pytest
from bundles import load_positions, make_engine, run_engine, run_on, same_bits, saved_positions

from edge_moe.runtime.engine_config import KV_TYPES

CONTEXT, TOKENS, SAVED = 224, 160, 101
NAMES = (
    *("qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4", "deepseek_v32", "deepseek_v4", "qwen3_5_moe", "nemotron_h"),
    *("lfm2_moe", "qwen4_exp"),
)
OTHERS = ({"context": CONTEXT, "chunk": 40}, {"context": 2 * CONTEXT, "chunk": 7, "threads": 2, "snapshots": 2})


@pytest.fixture(scope="module", params=NAMES)
def run(request, mixed, golden):
    """A bundle, token ids, and their logits."""
    path, vocab = mixed(request.param), golden[request.param][2].shape[1]
    ids = np.random.default_rng(3).integers(0, vocab, TOKENS).astype(np.int32)
    return path, ids, run_engine(make_engine(path, context=CONTEXT, chunk=16), ids, 16)


@pytest.mark.parametrize("kv", KV_TYPES)
def test_another_engine_goes_on_with_the_same_bits(run, kv):
    path, ids, want = run
    engine = make_engine(path, context=CONTEXT, chunk=16, kv=kv, snapshots=1)
    if kv == "float16":
        want = run_engine(engine, ids, 16)
        engine.truncate(0)
    run_on(engine, ids[:SAVED])
    whole = saved_positions(engine, SAVED)
    engine.snapshot()
    run_on(engine, ids[SAVED:])
    if engine.restorable(SAVED) == SAVED:
        assert len(saved_positions(engine, SAVED)) == len(whole)
    for sizes in OTHERS:
        other = make_engine(path, kv=kv, sequences=2, **sizes)
        run_on(other, ids[::-1][:70], 7, sequence=1)  # what was there before is not seen
        load_positions(other, ids[:SAVED], whole, sequence=1)
        assert same_bits(run_on(other, ids[SAVED:], 7, sequence=1), want[SAVED:])


def test_what_is_saved_from_a_snapshot_goes_on_with_the_same_bits(run):
    path, ids, want = run
    engine = make_engine(path, context=CONTEXT, chunk=16, snapshots=1)
    run_on(engine, ids[:SAVED])
    engine.snapshot()
    run_on(engine, ids[SAVED:])
    whole = saved_positions(engine, SAVED)
    for sizes in OTHERS:
        other = make_engine(path, **sizes)
        load_positions(other, ids[:SAVED], whole)
        assert same_bits(run_on(other, ids[SAVED:], 7), want[SAVED:])


def test_positions_that_were_loaded_are_rewound(run):
    path, ids, want = run
    engine = make_engine(path, context=CONTEXT, chunk=16)
    run_on(engine, ids[:SAVED])
    whole = saved_positions(engine, SAVED)
    other = make_engine(path, context=CONTEXT, chunk=16)
    load_positions(other, ids[:SAVED], whole)
    for wanted in (SAVED - 1, 50, 3):
        left = other.truncate(wanted)
        assert left in (0, wanted)
        assert same_bits(run_on(other, ids[left:]), want[left:])


def test_a_read_that_fails_leaves_an_empty_sequence(run):
    path, ids, want = run
    engine = make_engine(path, context=CONTEXT, chunk=16)
    run_on(engine, ids[:SAVED])
    calls = 0

    def read(piece):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        engine.load_positions(ids[:SAVED], read)
    assert engine.position == 0
    assert same_bits(run_on(engine, ids), want)
    with pytest.raises(ValueError, match="more ids than the context"):
        engine.load_positions(np.zeros(CONTEXT + 1, np.int32), read)
    assert engine.position == TOKENS  # nothing was tried
