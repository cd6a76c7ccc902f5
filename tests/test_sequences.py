"""Several sequences in one engine: the bits of each are those that it has alone, whoever comes and goes beside it."""

import numpy as np
import pytest
from bundles import (
    ALL,
    LAST,
    Request,
    make_engine,
    mask_routers_of,
    prunable,
    routers_of,
    run_engine,
    run_together,
    same_bits,
)
from golden_checkpoints import ARCHITECTURES

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.engine_config import KV_TYPES

RULES = [("off",), ("ratio", [0.6, 0.7]), ("share", [0.8, 0.7]), ("otp", [], 0.2), ("loss", [], 0.2)]


def requests(vocab: int, count: int, rules=(("off",),), seed: int = 1) -> list[Request]:
    """Of different lengths and steps, arriving in turn."""
    random = np.random.default_rng(seed)
    chunks = (1, 5, 1, 7, 2, 1, 16, 3)
    return [
        Request(random.integers(0, vocab, 6 + 5 * i % 23), chunks[i % 8], i // 2, rules[i % len(rules)])
        for i in range(count)
    ]


def alone(path, request: Request, **options) -> np.ndarray:
    engine = make_engine(path, **options)
    engine.set_prune(*request.rule)
    return run_engine(engine, request.ids, request.chunk)


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_requests_that_come_and_go_have_the_bits_that_each_has_alone(mixed, golden, architecture, kv):
    path, vocab = mixed(architecture), golden[architecture][2].shape[1]
    top_k = Bundle.open(path).config.top_k
    for sequences, slots, threads in ((2, None, 1), (4, top_k, 2), (8, top_k + 1, 1)):
        asked = requests(vocab, 2 * sequences)
        engine = make_engine(path, sequences=sequences, slots=slots, threads=threads, chunk=64, kv=kv)
        for request, got in zip(asked, run_together(engine, asked, sequences), strict=True):
            assert same_bits(got, alone(path, request, kv=kv))


@pytest.fixture(scope="module")
def pruned(golden, tmp_path_factory):
    source = golden["olmoe"][0]
    return prunable(tmp_path_factory.mktemp("pruned") / "b.emoe", source, mask_routers_of(Checkpoint(source).config))


def test_each_sequence_is_pruned_by_its_own_rule_and_accounts_add_up(pruned, golden):
    vocab, routers = golden["olmoe"][2].shape[1], {rule: routers_of(pruned, rule) for rule in ("otp", "loss")}
    asked = requests(vocab, 5, RULES)
    for request in asked:
        request.arrives = 0
    engine = make_engine(pruned, sequences=5, slots=5, chunk=64, **routers)
    engine.set_prefetch(False)
    together = run_together(engine, asked, 5)
    accounts = [engine.sequence_counters(sequence) for sequence in range(5)]
    used = []
    for request, got, account in zip(asked, together, accounts, strict=True):
        one = make_engine(pruned, **routers)
        one.set_prune(*request.rule)
        assert same_bits(got, run_engine(one, request.ids, request.chunk))
        for key in ("tokens", "experts_used", "moe_tokens"):
            assert account[key] == one.counters[key]
        assert account["dropped_weight"] == pytest.approx(one.counters["dropped_weight"], rel=1e-12)
        used.append(account["experts_used"] / account["moe_tokens"])
    assert used[0] == Bundle.open(pruned).config.top_k > max(used[1:])
    totals = engine.counters
    for key in accounts[0]:
        assert sum(account[key] for account in accounts) == pytest.approx(totals[key], rel=1e-12)
    assert totals["expert_misses"] > 0 and totals["read_ahead"] == 0


def test_a_protected_prompt_is_computed_in_a_step_of_its_own(pruned):
    routers, ids = {rule: routers_of(pruned, rule) for rule in ("otp", "loss")}, np.arange(1, 13, dtype=np.int32)
    one, engine = make_engine(pruned, **routers), make_engine(pruned, sequences=2, **routers)
    for its, sequence in ((one, 0), (engine, 1)):
        its.set_prune("ratio", [0.6, 0.7], 0.0, 0.2, sequence=sequence)
    want = one.forward(ids, ALL)
    with pytest.raises(ValueError, match="is computed in a step of its own"):
        engine.step([(0, ids[:1], LAST), (1, ids, ALL)])
    assert same_bits(engine.step([(1, ids, ALL)]), want)
    assert same_bits(engine.step([(0, ids[:1], LAST), (1, ids[:1], LAST)])[1:], one.forward(ids[:1], LAST))


def test_a_sequence_is_rewound_alone(mixed, golden):
    path, ids = mixed("qwen3_moe"), golden["qwen3_moe"][1]
    engine = make_engine(path, sequences=2)
    want = run_engine(make_engine(path), ids[:12])
    engine.step([(0, ids[:12].astype(np.int32), LAST), (1, ids[:10].astype(np.int32), LAST)])
    assert engine.truncate(4, sequence=1) == 4
    rows = engine.step([(1, ids[4:12].astype(np.int32), ALL), (0, ids[12:13].astype(np.int32), LAST)])
    assert same_bits(rows[:8], want[4:])
    assert engine.position == 13


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_positions_are_copied_to_another_sequence(mixed, golden, architecture, kv):
    path, ids = mixed(architecture), golden[architecture][1].astype(np.int32)
    engine, want = make_engine(path, sequences=3, kv=kv), run_engine(make_engine(path, kv=kv), ids)
    engine.forward(ids[:20], LAST, sequence=1)
    for positions in (19, 16, 3, 0):
        engine.copy_positions(1, 2, positions)
        assert same_bits(engine.forward(ids[positions:], ALL, sequence=2), want[positions:])
    assert same_bits(engine.forward(ids[20:], ALL, sequence=1), want[20:])
    for arguments, message in (
        ((1, 1, 3), "a sequence is not copied to itself"),
        ((1, 2, len(ids) + 1), "there are not as many positions"),
        ((1, 3, 1), "there is no such sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.copy_positions(*arguments)


def test_what_a_step_cannot_take_is_said_and_changes_nothing(mixed, golden):
    path, ids = mixed("olmoe"), golden["olmoe"][1].astype(np.int32)
    engine = make_engine(path, sequences=2, chunk=16, context=24, slots=4)
    want = run_engine(make_engine(path), ids[:4], 1)
    engine.step([(0, ids[:3], LAST), (1, ids[:3], LAST)])
    for parts, message in (
        ([], "a step takes 1 to chunk tokens"),
        ([(0, ids[:9], LAST), (1, ids[:8], LAST)], "a step takes 1 to chunk tokens"),
        ([(0, ids[:0], LAST), (1, ids[:8], LAST)], "a step takes 1 to chunk tokens"),
        ([(2, ids[:1], LAST)], "there is no such sequence"),
        ([(-1, ids[:1], LAST)], "there is no such sequence"),
        ([(0, ids[:1], LAST), (0, ids[:1], LAST)], "a sequence takes part in a step once"),
        ([(0, np.array([10**6], np.int32), LAST)], "token id out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.step(parts)
    for call in (lambda: engine.truncate(0, sequence=2), lambda: engine.set_prune("off", sequence=-1)):
        with pytest.raises(ValueError, match="there is no such sequence"):
            call()
    engine.inject("error")
    with pytest.raises(OSError):
        engine.step([(0, ids[20:21], LAST), (1, ids[3:4], LAST)])
    engine.clear_faults()
    rows = engine.step([(1, ids[3:4], LAST), (0, ids[3:4], LAST)])
    assert same_bits(rows[:1], want[3:]) and same_bits(rows[1:], want[3:])
    with pytest.raises(ValueError, match="sequences must be at least 1"):
        make_engine(path, sequences=0)
