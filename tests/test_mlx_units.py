"""Units that run ahead of the host: the same bits whatever is queued, in memory, read ahead or slow, and few waits."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bundles import ALL, LAST, run_together, same_bits
from test_cap import CONFIG
from test_sequences import requests

from edge_moe import _core
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.runtime.bundle import Bundle

pytest.importorskip("mlx.core")
from test_mlx_engine import mlx_engine

LAYERS, TOP_K, EXPERTS, TOKENS = 5, 3, 12, 6
SMALL = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS}
SMALL |= {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "vocab_size": 256}
WINDOWS = (0, 1, 2, LAYERS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("units")
    (directory / "config.json").write_text(json.dumps(CONFIG | SMALL))
    return make_synthetic(directory, directory / "small.emoe", width=4).path


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(9).integers(0, SMALL["vocab_size"], TOKENS)


@pytest.fixture(scope="module")
def want(bundle, ids) -> list[np.ndarray]:
    engine = mlx_engine(bundle)
    engine.set_window(0)
    return [engine.forward([token], LAST) for token in ids]


def counted(engine) -> np.ndarray:
    its = engine.counters
    return np.array([its[name] for name in ("units", "replays", "read_backs")])


@pytest.mark.parametrize("slowed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_the_window_changes_no_bit(bundle, ids, want, share, slowed):
    slots = max(TOP_K, share * LAYERS * EXPERTS)
    for window in WINDOWS:
        for prefetch in (True, False):
            engine = mlx_engine(bundle, slots=slots)
            engine.set_window(window)
            engine.set_prefetch(prefetch)
            if slowed:
                engine.inject("slow", value=20_000_000)  # bytes a second
            for token, row in zip(ids, want, strict=True):
                before = counted(engine)
                assert same_bits(engine.forward([token], LAST), row)
                units, replays, read_backs = counted(engine) - before
                assert read_backs == LAYERS + 1
                assert LAYERS + 1 <= units <= LAYERS + 1 + window * replays
                assert replays == 0 or window
            engine.clear_faults()
            its = engine.counters
            assert its["expert_hits"] + its["expert_misses"] == its["experts_used"] == TOKENS * LAYERS * TOP_K
            assert prefetch == (its["read_ahead"] > 0) or share in (0, 1)  # with no room for it, or all there soon


def test_with_every_expert_in_memory_a_token_waits_once(bundle, ids, want):
    engine, paged = mlx_engine(bundle), mlx_engine(bundle)
    residency = engine._records.residency
    for record in range(LAYERS * EXPERTS):
        assert residency.take([(record, 1)]) == [(record, False)]
        residency.release(record)
    for token, row in zip(ids, want, strict=True):
        before = counted(engine)
        assert same_bits(engine.forward([token], LAST), row)
        assert (counted(engine) - before).tolist() == [LAYERS + 1, 0, 1]
        paged.forward([token], LAST)
    assert engine.sequence_counters(0)["expert_hits"] == TOKENS * LAYERS * TOP_K == engine.counters["experts_used"]
    np.testing.assert_allclose(engine.worths, 1 + paged.worths)  # of the uses above, before the first layer


@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4", "qwen4_exp", "nemotron_h", "gpt_oss", "phimoe"])
def test_families_wait_once_a_layer_and_replays_leave_no_trace(mixed, golden, name):
    """Indexes, compressed rows, recurrent states and n-grams: what a void unit wrote is written again."""
    path, ids = mixed(name), golden[name][1][:18].astype(np.int32)
    config = Bundle.open(path).config
    found = []
    for window in (0, 2):
        engine = mlx_engine(path, slots=config.top_k + 2)
        engine.set_window(window)
        engine.forward(ids[:6], LAST)
        before = counted(engine)
        found.append(np.concatenate([engine.forward([token], LAST) for token in ids[6:]]))
        units, replays, read_backs = (counted(engine) - before) / len(ids[6:])
        assert read_backs == len(config.moe_layers) + 1
        assert (replays > 0) == (window > 0 and len(config.moe_layers) > 1)
    assert same_bits(*found)


def test_sequences_share_units(mixed, golden):
    path, vocab = mixed("olmoe"), golden["olmoe"][2].shape[1]
    found = []
    for window, slots in ((0, None), (1, 4), (2, 9)):
        asked = [replace(request, chunk=1) for request in requests(vocab, 4)]
        engine = mlx_engine(path, sequences=4, slots=slots, chunk=64)
        engine.set_window(window)
        found.append(run_together(engine, asked, 4))
        steps = max(request.arrives + len(request.ids) for request in asked)
        layers = len(Bundle.open(path).config.moe_layers)
        assert engine.counters["read_backs"] <= steps * (layers + 1) < sum(len(its.ids) for its in asked) * layers
    for one in found[1:]:
        assert all(same_bits(*pair) for pair in zip(found[0], one, strict=True))


@pytest.mark.parametrize("window", [0, 1, LAYERS])
def test_a_failed_read_leaves_the_step_to_be_tried_again(bundle, ids, want, window):
    engine = mlx_engine(bundle, slots=TOP_K + 1)
    engine.set_window(window)
    for at, (token, row) in enumerate(zip(ids, want, strict=True)):
        engine.inject("error", after=at % 3, times=1)
        with pytest.raises(OSError, match="Input/output error"):
            engine.forward([token], LAST)
        engine.clear_faults()
        assert engine.position == at
        assert same_bits(engine.forward([token], LAST), row)
    engine.inject("slow", value=10_000)
    with pytest.raises(_core.Interrupted):
        engine.forward(ids[:1], ALL, lambda: True)
    engine.clear_faults()
    assert engine.position == len(ids)
