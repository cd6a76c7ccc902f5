"""The mlx device: logits of transformers, and the same bits whatever is in memory, beside whatever sequences."""

import threading
from pathlib import Path

import numpy as np
import pytest
from bundles import (
    ALL,
    LAST,
    Pruned,
    load_positions,
    make_engine,
    mask_routers_of,
    prunable,
    run_engine,
    run_together,
    same_bits,
    saved_positions,
    weights_of,
    write_lossless,
)
from golden_checkpoints import CHECKPOINTS, DROPPED, dropped_logits
from test_prune_engine import kept_of, rule_of
from test_sequences import RULES, requests

from edge_moe import _core
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.layers import attention, indexer
from edge_moe.runtime.pruning import read_mask_routers

mx = pytest.importorskip("mlx.core")
from edge_moe.runtime.mlx.engine import MlxEngine, Sizes  # noqa: E402

RECURRENT = ["qwen3_next", "lfm2_moe", "nemotron_h", "qwen4_exp", "deepseek_v4"]


def mlx_engine(path: Path, *, slots: float | None = None, chunk: int = 32, context: int = 64, masks=None, **sizes):
    """An engine with memory for `slots` of a bundle's largest records, or all, that returns all rows of logits."""
    bundle = Bundle.open(path)
    largest = max(expert.nbytes for expert in bundle.experts.values())
    nbytes = bundle.expert_bytes if slots is None else int(slots * largest)
    return MlxEngine(bundle, Sizes(context, chunk, chunk, **{"kv": "float32", "slot_bytes": nbytes, **sizes}), masks)


def masks_of(path: Path) -> dict[str, list[np.ndarray]]:
    bundle = Bundle.open(path)
    return read_mask_routers(path, bundle.pruning, bundle.table)


@pytest.fixture(scope="module")
def lossless(golden, tmp_path_factory):
    """lossless("olmoe") is the path of the golden checkpoint's bundle."""
    directory, made = tmp_path_factory.mktemp("lossless"), {}

    def make(name: str) -> Path:
        if name not in made:
            checkpoint = Checkpoint(golden[name][0])
            made[name] = write_lossless(directory / f"{name}.emoe", golden[name][0], checkpoint.config, checkpoint)
        return made[name]

    return make


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_lossless_logits_equal_those_of_transformers(lossless, golden, name):
    _, ids, want = golden[name]
    engine = mlx_engine(lossless(name), slots=10)
    for chunk in (32, 5, 1):
        got = run_engine(engine, ids, chunk)
        assert np.abs(got - want).max() <= 1e-4
        assert np.array_equal(got.argmax(-1), want.argmax(-1))
    assert same_bits(run_engine(mlx_engine(lossless(name)), ids, 1), got)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v32", "deepseek_v4", "qwen4_exp"])
def test_queries_may_attend_in_parts(lossless, golden, monkeypatch, name):
    """As they do where all scores at once would take too much memory."""
    _, ids, want = golden[name]
    for module in (attention, indexer):
        monkeypatch.setattr(module, "SCORES", 300)
    assert np.abs(run_engine(mlx_engine(lossless(name)), ids, 32) - want).max() <= 1e-4


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 8])
def test_widths_give_the_logits_of_the_reference_and_nearly_those_of_the_cpu_engine(bundle_of, golden, width):
    path, ids = bundle_of("olmoe", width=width), golden["olmoe"][1]
    want = reference.forward(Bundle.open(path).config, weights_of(path), ids)
    for chunk, slots in ((1, 4), (32, None)):
        got = run_engine(mlx_engine(path, slots=slots), ids, chunk)
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    miss = np.sqrt(np.square(got - run_engine(make_engine(path), ids)).mean(-1))
    assert 0 < np.median(miss) < 0.06 * want.std()  # its inputs have eight bits


@pytest.mark.parametrize("architecture", DROPPED)
def test_without_the_dropped_experts_the_logits_are_those_of_transformers(dropped_of, golden, architecture):
    path, ids, want = dropped_of(architecture, (16, 16, 16)), golden[architecture][1], dropped_logits(architecture)
    engine = mlx_engine(path, slots=4)
    engine.set_prune("ratio", [0.0] * Bundle.open(path).config.layer_count)  # which prunes none
    for chunk in (32, 1):
        assert np.abs(run_engine(engine, ids, chunk) - want).max() <= 1e-4
    assert engine.counters["dropped_weight"] == 0


@pytest.mark.parametrize("kv", ["float16", "float32"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_packed_logits_are_those_of_the_reference(mixed, golden, name, kv):
    path, ids = mixed(name), golden[name][1]
    bundle = Bundle.open(path)
    want = reference.forward(bundle.config, weights_of(path), ids)
    miss = np.abs(run_engine(mlx_engine(path, kv=kv), ids, 11) - want).max()
    assert miss <= (1e-4 if kv == "float32" else 0.02) * np.abs(want).max()


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss", "deepseek_v3", "qwen4_exp"])
def test_what_is_in_memory_changes_no_bit(mixed, golden, name):
    path, ids = mixed(name), golden[name][1]
    top_k = Bundle.open(path).config.top_k
    for chunk in (1, 13):
        want = run_engine(mlx_engine(path), ids, chunk)
        for slots in (top_k, top_k + 2.5):
            engine = mlx_engine(path, slots=slots)
            assert same_bits(run_engine(engine, ids, chunk), want)
            assert engine.counters["expert_misses"] > len(Bundle.open(path).experts)
            assert engine.counters["records_held"] < len(Bundle.open(path).experts)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "qwen4_exp"])
def test_requests_that_come_and_go_have_the_bits_that_each_has_alone(mixed, golden, name):
    path, vocab = mixed(name), golden[name][2].shape[1]
    asked = requests(vocab, 6)
    engine = mlx_engine(path, sequences=3, slots=Bundle.open(path).config.top_k, chunk=64)
    for request, got in zip(asked, run_together(engine, asked, 3), strict=True):
        assert same_bits(got, run_engine(mlx_engine(path), request.ids, request.chunk))


# ---- sequences


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v32", "gpt_oss", *RECURRENT])
def test_a_sequence_is_rewound_restored_and_copied(mixed, golden, name):
    path, ids = mixed(name), golden[name][1].astype(np.int32)
    engine, fresh = mlx_engine(path, sequences=2, snapshots=2), mlx_engine(path)
    engine.step([(0, ids[:8], LAST)])
    engine.snapshot(0)
    engine.step([(0, ids[8:20], LAST)])
    kept = 8 if name in RECURRENT else 15  # a recurrent state can only be restored where it was kept
    assert engine.restorable(15, sequence=0) == kept
    engine.copy_positions(0, 1, kept)
    assert engine.truncate(15) == kept == engine.position
    other = ids[::-1].copy()
    fresh.step([(0, ids[:8], LAST)])
    if kept > 8:
        fresh.step([(0, ids[8:20], LAST)])
        assert fresh.truncate(kept) == kept
    want = fresh.step([(0, other[:9], ALL)])
    assert same_bits(engine.step([(1, other[:9], ALL)]), want)
    assert same_bits(engine.step([(0, other[:9], ALL)]), want)
    assert engine.truncate(0) == 0
    assert same_bits(engine.forward(ids[:8], LAST), mlx_engine(path).forward(ids[:8], LAST))


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "deepseek_v32", "gpt_oss", *RECURRENT])
def test_what_is_saved_goes_on_in_another_engine(mixed, golden, name):
    path, ids = mixed(name), golden[name][1].astype(np.int32)
    engine = mlx_engine(path, snapshots=1, kv="float16")
    want = [engine.forward(ids[:17], LAST), engine.snapshot(), engine.forward(ids[17:], ALL)][2]
    whole = saved_positions(engine, 17)
    other = mlx_engine(path, sequences=2, context=96, slots=6, kv="float16")
    other.forward(ids[::-1][:9], LAST, sequence=1)  # what was there before is not seen
    load_positions(other, ids[:17], whole, sequence=1)
    assert saved_positions(other, 17, sequence=1) == whole
    assert same_bits(other.forward(ids[17:], ALL, sequence=1), want)
    with pytest.raises(ZeroDivisionError):
        other.load_positions(ids[:17], lambda piece: 1 / 0, sequence=1)
    load_positions(other, ids[:17], whole, sequence=0)
    assert other.restorable(0, sequence=1) == 0
    assert same_bits(other.forward(ids[17:], ALL), want)
    with pytest.raises(ValueError, match="more ids than the context"):
        engine.load_positions(np.zeros(65, np.int32), None)


def test_the_least_recently_used_snapshot_makes_room(mixed, golden):
    path, ids = mixed("qwen3_next"), golden["qwen3_next"][1].astype(np.int32)
    engine = mlx_engine(path, snapshots=2)
    for at in (0, 4, 8):
        engine.forward(ids[at : at + 4], LAST)
        engine.snapshot()
        assert engine.restorable(4) == 4 or at == 0  # which uses it
    assert engine.restorable(11) == 4  # 8 made room for 12
    assert engine.truncate(7) == 4
    assert engine.restorable(3) == 0


def test_calls_may_come_from_any_thread(mixed, golden):
    path, ids = mixed("olmoe"), golden["olmoe"][1].astype(np.int32)
    engine, found = mlx_engine(path), []
    for token in ids:
        thread = threading.Thread(target=lambda token=token: found.append(engine.forward([token], LAST)))
        thread.start()
        thread.join()
    assert same_bits(np.concatenate(found), run_engine(mlx_engine(path), ids, 1))


# ---- pruning


@pytest.mark.parametrize("kind", ["ratio", "share", "otp", "loss"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_logits_are_those_of_the_reference_pruned_alike(golden, tmp_path, name, kind):
    directory, ids, whole = golden[name]
    checkpoint = Checkpoint(directory)
    masks = mask_routers_of(checkpoint.config)
    rule, pruned = rule_of(kind, checkpoint.config), Pruned(checkpoint)
    want = pruned.logits(ids, kept_of(rule, masks))
    path = prunable(tmp_path / "b.emoe", directory, masks)
    engine = mlx_engine(path, masks=masks_of(path))
    engine.set_prune(rule.rule, rule.threshold, rule.price)
    for chunk in (1, 32):
        got, before = run_engine(engine, ids, chunk), engine.counters
        assert np.abs(got - want).max() <= 1e-4 < np.abs(got - whole).max()
    assert before["experts_used"] == 2 * pruned.used
    assert before["dropped_weight"] == pytest.approx(2 * pruned.dropped, rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss"])
def test_protected_tokens_are_those_of_the_cpu_engine(golden, tmp_path, name):
    """By how many experts each prompt keeps in each layer, and by the logits."""
    source, ids, _ = golden[name]
    checkpoint = Checkpoint(source)
    path = prunable(tmp_path / "b.emoe", source, mask_routers_of(checkpoint.config))
    layers, found = checkpoint.config.layer_count, []
    for engine in (mlx_engine(path, chunk=32, sequences=2), make_engine(path, chunk=32)):
        engine.set_prune("ratio", [1.0] * layers, 0.0, 0.2)
        logits = [engine.forward(ids[:20].astype(np.int32), ALL), engine.forward(ids[20:32].astype(np.int32), ALL)]
        found.append((np.concatenate(logits), engine.counters["experts_used"]))
    (ours, used), (theirs, wanted) = found
    top_k = checkpoint.config.top_k
    assert used == wanted == layers * (len(ids[:32]) + (5 + 3) * (top_k - 1))  # 0.2 of 20 is a little above 4
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max()


def test_a_prompt_that_is_protected_has_a_step_of_its_own(golden, tmp_path):
    source, ids, _ = golden["olmoe"]
    path = prunable(tmp_path / "b.emoe", source, mask_routers_of(Checkpoint(source).config))
    engine = mlx_engine(path, sequences=2)
    engine.set_prune("ratio", [0.5, 0.5], 0.0, 0.2, sequence=1)
    with pytest.raises(ValueError, match="is computed in a step of its own"):
        engine.step([(0, ids[:1], LAST), (1, ids[:4], LAST)])
    engine.step([(0, ids[:1], LAST), (1, ids[:1], LAST)])


def test_tokens_cannot_be_protected_where_no_attention_is_received(mixed):
    engine = mlx_engine(mixed("deepseek_v3"))
    with pytest.raises(ValueError, match="only attention with keys in every layer tells"):
        engine.set_prune("ratio", [0.5] * engine.config.layer_count, 0.0, 0.1)


def test_each_sequence_has_its_own_rule_and_account(golden, tmp_path):
    source = golden["olmoe"][0]
    path = prunable(tmp_path / "b.emoe", source, mask_routers_of(Checkpoint(source).config))
    masks = masks_of(path)
    asked = requests(golden["olmoe"][2].shape[1], 5, RULES)
    engine = mlx_engine(path, sequences=5, slots=5, chunk=64, masks=masks)
    engine.set_prefetch(False)  # what is read ahead is counted for none
    together = run_together(engine, asked, 5)
    for sequence, (request, got) in enumerate(zip(asked, together, strict=True)):
        one = mlx_engine(path, masks=masks)
        one.set_prune(*request.rule)
        assert same_bits(got, run_engine(one, request.ids, request.chunk))
        for key in ("tokens", "experts_used", "moe_tokens", "dropped_weight"):
            assert engine.sequence_counters(sequence)[key] == one.counters[key]
    for key, total in engine.counters.items():
        if key in engine.sequence_counters(0):
            assert total == pytest.approx(sum(engine.sequence_counters(its)[key] for its in range(5)))


# ---- what it counts, and what goes wrong


@pytest.mark.parametrize("slots", [3, 4.5])
def test_records_leave_and_are_counted_as_in_the_cpu_engine(lossless, golden, slots):
    path, ids = lossless("olmoe"), golden["olmoe"][1]
    ours, theirs = mlx_engine(path, slots=slots, readers=2), make_engine(path, slots=slots)
    for engine in (ours, theirs):
        engine.set_prefetch(False)
        run_engine(engine, ids, 1)
    assert ours.counters.items() >= theirs.counters.items() and ours.counters["expert_misses"] > 0
    assert np.array_equal(ours.worths, theirs.worths)
    assert ours.sequence_counters(0) == theirs.sequence_counters(0)


def test_a_failed_read_is_said_and_changes_nothing(mixed, golden):
    path, ids = mixed("qwen3_next"), golden["qwen3_next"][1].astype(np.int32)
    engine, want = mlx_engine(path, slots=4), run_engine(mlx_engine(path), ids, 4)
    engine.forward(ids[:4], LAST)
    for kind, error, said in (("error", OSError, "Input/output error"), ("flip", _core.DamagedFile, "checksum")):
        engine.inject(kind, after=3, times=1)
        with pytest.raises(error, match=said):
            engine.forward(ids[4:20], ALL)
        engine.clear_faults()
        assert engine.position == 4
    engine.inject("slow", value=10_000)
    with pytest.raises(_core.Interrupted):
        engine.forward(ids[4:20], ALL, lambda: True)
    engine.clear_faults()
    got = [engine.forward(ids[at : at + 4], ALL) for at in range(4, len(ids), 4)]
    assert same_bits(np.concatenate(got), want[4:])


def test_memory_for_experts_is_lowered_and_raised_between_steps(mixed, golden):
    path, ids = mixed("olmoe"), golden["olmoe"][1].astype(np.int32)
    bundle = Bundle.open(path)
    engine, found = mlx_engine(path), []
    for part, share in zip(np.split(ids, 4), (1, 0.5, 0.3, 0.8), strict=True):
        engine.resize_slots(int(share * bundle.expert_bytes))
        found += [engine.forward([token], LAST) for token in part]
    assert same_bits(np.concatenate(found), run_engine(mlx_engine(path), ids, 1))


@pytest.mark.parametrize(
    "parts, message",
    [
        ([(0, [], LAST)], "a step takes 1 to chunk tokens"),
        ([(0, [1] * 33, LAST)], "a step takes 1 to chunk tokens"),
        ([], "a step takes 1 to chunk tokens"),
        ([(2, [1], LAST)], "there is no such sequence"),
        ([(0, [1], LAST), (0, [1], LAST)], "a sequence takes part in a step once"),
        ([(0, [-1], LAST)], "token id out of range"),
        ([(0, [1] * 20, ALL), (1, [1] * 13, ALL)], "a step takes 1 to chunk tokens"),
    ],
)
def test_a_step_that_cannot_be_is_refused(mixed, parts, message):
    engine = mlx_engine(mixed("olmoe"), sequences=2)
    with pytest.raises(ValueError, match=message):
        engine.step(parts)
    assert engine.position == 0
