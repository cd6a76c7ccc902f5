"""Sliding windows: a KV cache as long as the window and a step gives the bits of one that holds the whole context."""

import numpy as np
import pytest
from bundles import ALL, LAST, check_rewinds, make_engine, run_engine, run_on, same_bits
from test_sequences import alone, requests

from edge_moe import _core
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.engine_config import KV_TYPES, engine_config, engine_memory
from edge_moe.runtime.runtime import Runtime

CONTEXT = 200
NAMES = ("mixtral", "gpt_oss")  # a window in all layers, and in some


@pytest.fixture(params=NAMES)
def windowed(request, mixed, golden):
    """A bundle, 190 token ids, and their logits with a cache of the whole context."""
    path, vocab = mixed(request.param), golden[request.param][2].shape[1]
    ids = np.random.default_rng(2).integers(0, vocab, 190).astype(np.int32)
    whole = make_engine(path, context=CONTEXT, chunk=CONTEXT)  # a step as long as the context
    return path, ids, run_engine(whole, ids, CONTEXT)


@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_short_cache_gives_the_bits_of_a_whole_one(windowed, kv):
    path, ids, want = windowed
    if kv == "float16":
        want = run_engine(make_engine(path, context=CONTEXT, chunk=CONTEXT, kv=kv), ids, CONTEXT)
    for kernels in _core.kernel_names():
        for chunk, threads in ((16, 1), (7, 2), (1, 1), (32, 2)):
            engine = make_engine(path, context=CONTEXT, chunk=chunk, threads=threads, kv=kv, kernels=kernels)
            assert same_bits(run_engine(engine, ids, chunk), want)


def test_random_steps_rewinds_and_snapshots_change_no_bit(windowed):
    path, ids, want = windowed
    for seed in range(4):
        check_rewinds(make_engine(path, context=CONTEXT, chunk=16, snapshots=seed), ids, want, seed, 70)


def test_a_few_tokens_are_rewound_without_a_snapshot_and_many_with_one(windowed):
    path, ids, want = windowed
    engine = make_engine(path, context=CONTEXT, chunk=16, snapshots=1)
    for first in range(0, 96, 16):
        engine.forward(ids[first : first + 16], LAST)
    engine.snapshot()
    run_on(engine, ids[96:140])
    assert engine.restorable(124) == 124  # the cache has a step's tokens more than the window
    assert engine.restorable(110) == engine.restorable(96) == 96
    assert engine.restorable(95) == 0
    assert engine.truncate(126) == 126
    assert same_bits(engine.forward(ids[126:140], ALL), want[126:140])
    assert engine.truncate(110) == 96
    assert engine.restorable(95) == 0
    assert same_bits(run_on(engine, ids[96:]), want[96:])
    assert engine.truncate(5) == 0
    assert same_bits(run_on(engine, ids), want)


def test_a_prefix_is_copied_with_its_windows(windowed):
    path, ids, want = windowed
    engine = make_engine(path, context=CONTEXT, chunk=16, snapshots=1, sequences=2)
    run_on(engine, ids[:80])
    engine.snapshot()
    run_on(engine, ids[80:144])
    for positions in (144, 140, 80, 0):
        engine.copy_positions(0, 1, positions)
        assert same_bits(run_on(engine, ids[positions:], sequence=1), want[positions:])
    with pytest.raises(ValueError, match="the state of that position is not there any more"):
        engine.copy_positions(0, 1, 100)


def test_a_step_that_fails_leaves_the_windows_as_they_were(windowed):
    path, ids, want = windowed
    engine = make_engine(path, context=CONTEXT, chunk=16, slots=Bundle.open(path).config.top_k)
    run_on(engine, ids[:70])
    for after in range(0, 9, 2):
        engine.inject("error", after=after)
        with pytest.raises(OSError):
            engine.forward(ids[70:86], ALL)
        engine.clear_faults()
    assert engine.restorable(69) in (0, 69)
    assert same_bits(run_on(engine, ids[70:]), want[70:])


def test_several_sequences_have_windows_of_their_own(windowed, golden):
    path, ids, _ = windowed
    asked = requests(128, 6, seed=5)
    engine = make_engine(path, context=CONTEXT, chunk=16, sequences=3)
    at = [0] * 3
    got: list[list[np.ndarray]] = [[], [], []]
    while any(position < len(request.ids) for position, request in zip(at, asked, strict=False)):
        parts = []
        for sequence, request in enumerate(asked[:3]):
            its = np.asarray(request.ids[at[sequence] : at[sequence] + 5], np.int32)
            if len(its):
                parts.append((sequence, its, ALL))
                at[sequence] += len(its)
        rows = engine.step(parts)
        for sequence, its, _ in parts:
            got[sequence].append(rows[: len(its)])
            rows = rows[len(its) :]
    for request, rows in zip(asked, got, strict=False):
        assert same_bits(np.concatenate(rows), alone(path, request, context=CONTEXT, chunk=CONTEXT))


def test_the_cache_of_windows_does_not_grow_with_the_context(mixed):
    path = mixed("mixtral")
    config = Bundle.open(path).config
    window = config.attention.window
    short, long = (engine_memory(config, context, 16)[0] for context in (64, 256))
    assert short == long == engine_config(config, 64, 16).layers * 2 * 2 * 16 * 2 * (-(-(window - 1 + 16) // 16) * 16)
    assert engine_memory(config, 16, 16)[0] < short


@pytest.mark.parametrize("name", NAMES)
def test_answers_after_other_turns_are_those_of_a_fresh_run(mixed, golden, name, monkeypatch):
    monkeypatch.setattr("edge_moe.runtime.plan.CHUNKS", (16,))  # with longer steps the windows hold the whole context
    path, vocab = mixed(name), golden[name][2].shape[1]
    end = Bundle.open(path).config.eos_tokens[0]
    ids = [int(token) for token in np.random.default_rng(4).integers(0, vocab, 400) if token != end]
    first = [*ids[:120], end, *ids[120:124]]
    prompts = [first, [*first, *ids[200:204]], [*ids[:120], end, *ids[124:150]], [*ids[:60], *ids[160:200]]]

    def fresh(prompt):
        with Runtime(path, context=200) as runtime:
            return runtime.generate(prompt, 8).tokens

    found = []
    with Runtime(path, context=200) as runtime:
        assert runtime.plan.snapshots == 2 and runtime.plan.state_bytes > 0
        for prompt in prompts:
            answer = runtime.generate(prompt, 8)
            assert answer.tokens == fresh(prompt)
            found.append(answer.cached_tokens)
    assert found == [0, 125, 121, 0]
    assert "2 to go on from" in str(runtime.plan)
