"""The slots: as large as their records, whatever comes and goes, with the bits of every expert in memory."""

import numpy as np
import pytest
from bundles import REFERENCE, make_engine, run_engine, write_bundle

from bench.laboratory.cache_policies import HALF_LIFE, record
from edge_moe import _core
from edge_moe.bench.evaluate import Cached
from edge_moe.compressor.rounding.quantise import trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.config_file import load_config

WIDTHS = (1, 2, 8, 3, 1)  # of experts, in turn: records of four sizes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    checkpoint = Checkpoint(REFERENCE)
    config = checkpoint.config
    keys = [(layer, index) for layer in config.moe_layers for index in range(config.experts)]
    experts = {key: Packing((WIDTHS[i % len(WIDTHS)],) * 3, 64) for i, key in enumerate(keys)}
    out = tmp_path_factory.mktemp("cache") / "mixed.emoe"
    return write_bundle(out, REFERENCE, config, checkpoint, trunk_packing(trunk_shapes(config), 8, 64), experts)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(0, 4096, 300)


def test_records_of_several_sizes_share_memory_and_change_no_bit(bundle, ids):
    sizes = sorted(expert.nbytes for expert in Bundle.open(bundle).experts.values())
    want = run_engine(make_engine(bundle, context=300), ids)
    for slots in (1, 2, 4, 8, 13):
        engine = make_engine(bundle, context=300, slots=slots, threads=2)
        for chunk in (1, 32, 3):
            got = run_engine(engine, ids, chunk)
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
            held = engine.counters["records_held"]
            assert sum(sizes[:held]) <= slots * sizes[-1]  # at least so much do they take
            assert held >= slots
        assert held > slots


def test_what_is_wanted_often_stays_whatever_its_size(bundle, ids):
    """A text again, with room for what it uses: nothing is read the second time, and nothing twice the first."""
    opened = Bundle.open(bundle)
    engine = make_engine(bundle, context=300, slots=len(opened.experts))
    run_engine(engine, ids)
    first = engine.counters
    run_engine(engine, ids)
    assert engine.counters["bytes_read"] == first["bytes_read"] <= opened.expert_bytes
    assert engine.counters["records_held"] == first["expert_misses"] <= len(opened.experts)


def test_less_than_the_largest_record_is_refused(bundle):
    make_engine(bundle, slots=1)
    with pytest.raises(ValueError, match="the slots must hold the largest record"):
        make_engine(bundle, slots=0.9)


@pytest.mark.parametrize("chunk", [64, 1])
def test_each_token_that_uses_an_expert_counts_in_a_prompt_as_when_it_is_generated(bundle_of, stdlib_ids, chunk):
    ids, config = stdlib_ids[:64], load_config(REFERENCE)
    engine = make_engine(bundle_of("reference", bits=16), context=64, slots=32, chunk=64)
    run_engine(engine, ids, chunk)
    with Checkpoint(REFERENCE) as checkpoint:
        trace = record(config, Cached(checkpoint), np.array(ids))  # by token and layer
    want = np.zeros(config.expert_count)
    for step, experts in enumerate(trace):
        token, layer = divmod(step, config.layer_count)
        layers_before = token // chunk * config.layer_count + layer
        want[experts] += 2.0 ** (layers_before / (HALF_LIFE * config.layer_count))
    np.testing.assert_allclose(engine.worths, want, rtol=1e-12)


# ---- reading ahead


def test_reading_ahead_changes_no_bit_and_is_accounted_for(bundle, ids):
    sizes = [expert.nbytes for expert in Bundle.open(bundle).experts.values()]
    want, seen = run_engine(make_engine(bundle, context=300), ids), 0
    for slots in (1, 3, 8):
        for on in (False, True):
            engine = make_engine(bundle, context=300, slots=slots, threads=2)
            engine.set_prefetch(on)
            got = run_engine(engine, ids, 1)
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
            counters = engine.counters
            reads = counters["expert_misses"] + counters["read_ahead"]
            assert reads * min(sizes) <= counters["bytes_read"] <= reads * max(sizes)
            assert counters["read_ahead_used"] <= counters["read_ahead"]
            assert on or counters["read_ahead"] == 0
            seen += counters["read_ahead"]
    assert seen > 0


def test_a_prompt_reads_nothing_ahead(bundle, ids):
    engine = make_engine(bundle, context=300, slots=4)
    run_engine(engine, ids, 32)
    run_engine(engine, ids[:64], 32)
    assert engine.counters["read_ahead"] == 0


def test_reading_ahead_stops_where_less_than_half_is_used_and_is_tried_again():
    gate = _core.PrefetchGate()
    assert all(gate.open(0, 0) for _ in range(50))
    assert gate.open(63, 0)  # too few to judge by
    assert gate.open(64, 32)
    opened = [gate.open(128, 63) for _ in range(512)]  # 31 of 64
    assert opened[:150] == [False] * 150
    assert sum(opened) == 16
    assert gate.open(1000, 63 + 500)
