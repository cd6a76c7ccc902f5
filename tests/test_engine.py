"""The gates: logits equal transformers', paging, threads, chunks and instruction sets change no bit, the cap holds."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bundles import (
    ALL,
    LAST,
    NOTHING,
    REFERENCE,
    Kept,
    logits_of,
    make_engine,
    run_engine,
    run_python,
    same_bits,
    weights_of,
    write_bundle,
    write_lossless,
)
from golden_checkpoints import ARCHITECTURES, CHECKPOINTS, DROPPED, dropped_logits

from edge_moe import _core
from edge_moe.bench.evaluate import evaluate
from edge_moe.compressor.rounding.quantise import trunk_packing
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.engine_config import KV_TYPES
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import LOGITS_ROWS

FAST_SETS = [name for name in _core.kernel_names() if name != "scalar"]


# ---- G1: the same logits as transformers


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_lossless_logits_equal_those_of_transformers(golden, tmp_path, name):
    directory, ids, want = golden[name]
    checkpoint = Checkpoint(directory)
    got = logits_of(write_lossless(tmp_path / "lossless.emoe", directory, checkpoint.config, checkpoint), ids)
    assert np.abs(got - want).max() <= 1e-4  # float32 sums of logits near ten, in another order
    assert np.array_equal(got.argmax(-1), want.argmax(-1))


def test_eight_bits_predict_what_sixteen_do(bundle_of, stdlib_ids):
    with (
        Runtime(bundle_of("reference", bits=16), context=256, logits_rows=LOGITS_ROWS) as lossless,
        Runtime(bundle_of("reference", width=8), context=256, logits_rows=LOGITS_ROWS) as runtime,
    ):
        result = evaluate(runtime, stdlib_ids, against=lossless.logits)
    assert result["tokens"] == 1020
    assert result["top1_agreement"] >= 0.98
    assert result["kld_mean"] <= 1e-3


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_cache_of_halves_changes_little(golden, tmp_path, name):
    directory, ids, want = golden[name]
    checkpoint = Checkpoint(directory)
    path = write_lossless(tmp_path / "lossless.emoe", directory, checkpoint.config, checkpoint)
    miss = np.abs(logits_of(path, ids, kv="float16") - want)
    # Halves are within 2^-11; a router may fall the other way at single tokens of these random models.
    assert 1e-5 < np.median(miss) < 2e-3 * want.std()


@pytest.mark.parametrize("part", ["q", "k", "v", "o", "embedding"])
def test_widths_of_the_trunk_may_differ_within_a_layer(golden, tmp_path, part):
    directory, ids, want = golden["qwen3_moe"]
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    trunk = trunk_packing(trunk_shapes(config), 8, 64)
    trunk = {name: Packing((16,), 0) if name.endswith(part) else packing for name, packing in trunk.items()}
    experts = {(layer, index): Packing((16, 8, 16), 32) for layer in range(2) for index in range(6)}
    path = write_bundle(tmp_path / "mixed.emoe", directory, config, checkpoint, trunk, experts)
    miss = np.sqrt(np.square(logits_of(path, ids) - want).mean(-1))
    # 8 bits everywhere make 0.04; at single tokens the router falls the other way.
    assert np.median(miss) < 0.06 * want.std()


@pytest.mark.parametrize("architecture", DROPPED)
def test_lossless_logits_equal_those_of_transformers_without_the_dropped_experts(dropped_of, golden, architecture):
    _, ids, whole = golden[architecture]
    want = dropped_logits(architecture)
    assert np.abs(want - whole).max() > 1
    got = logits_of(dropped_of(architecture, (16, 16, 16)), ids)
    assert np.abs(got - want).max() <= 1e-4
    assert np.array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize(
    ("architecture", "kept", "layer_top_k"),
    [
        ("qwen3_moe", ((1, 2, 3, 5), (0, 4)), (3, 2)),
        ("qwen3_moe", ((), ()), (1, 2)),
        ("mixtral", ((6, 7), (0, 1, 2, 3, 4, 5, 6)), ()),
        ("qwen2_moe", ((0, 1, 2, 3, 4, 5, 6, 7), (), (2, 3, 4)), (2, 0, 3)),
        ("deepseek_v3", ((), (0, 1, 4, 5, 6, 10, 11, 12, 13, 14), (2, 3, 8, 9, 10, 11)), (0, 4, 3)),
    ],
)
def test_a_fresh_checkpoint_gives_the_logits_of_transformers_without_some_experts(
    tmp_path, architecture, kept, layer_top_k
):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import logits_of as transformers_logits
    from make_golden import random_model

    random_model(architecture, seed=13).save_pretrained(tmp_path)
    ids = np.random.default_rng(13).integers(0, 128, 40)
    want = transformers_logits(tmp_path, ids, kept, layer_top_k)
    checkpoint = Checkpoint(tmp_path)
    config = replace(checkpoint.config, kept=kept if any(kept) else (), layer_top_k=layer_top_k)
    weights = Kept(checkpoint, config) if config.kept else checkpoint
    got = logits_of(write_lossless(tmp_path / "dropped.emoe", tmp_path, config, weights), ids)
    assert np.abs(got - want).max() <= 1e-4
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
    np.testing.assert_allclose(reference.forward(config, weights, ids), want, rtol=0, atol=1e-4)


# ---- G2: where experts come from, threads and chunks change nothing


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paged_equals_resident_for_any_slots_threads_and_chunks(mixed, golden, architecture, kv):
    path, ids = mixed(architecture), golden[architecture][1]
    bundle = Bundle.open(path)
    assert len({expert.widths for expert in bundle.experts.values()}) > 1
    want = run_engine(make_engine(path, kv=kv), ids)
    top_k, records = bundle.config.top_k, len(bundle.experts)
    for slots in (None, top_k, top_k + 1, records // 2, records):
        for threads in (1, 2, 3):
            engine = make_engine(path, slots=slots, threads=threads, kv=kv)
            for chunk in (1, 7, 32):
                assert same_bits(run_engine(engine, ids, chunk), want), (slots, threads, chunk)
            assert (engine.counters["expert_misses"] > 0) == (slots is not None)


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])  # a window of its keys, and latents
def test_chunks_and_threads_change_nothing_where_sums_over_positions_have_several_pieces(mixed, architecture):
    path = mixed(architecture)
    engine = make_engine(path, context=4_200, threads=1)
    ids = np.random.default_rng(0).integers(0, Bundle.open(path).config.vocab, 4_120)
    want = run_engine(engine, ids, 32)[4_090:]
    for threads, chunk in ((2, 7), (1, 1)):
        engine = make_engine(path, context=4_200, threads=threads)
        run_engine(engine, ids[:4_090], 32)
        parts = [ids[at : at + chunk] for at in range(4_090, len(ids), chunk)]
        got = np.concatenate([engine.forward(np.asarray(part, np.int32), ALL) for part in parts])
        assert same_bits(got, want), (threads, chunk)


def looked_up(bundle: Bundle) -> list[int]:
    """The layers whose experts a table tells for each token, of which some may have been dropped."""
    return [layer for layer in bundle.config.moe_layers if bundle.config.is_hashed(layer)]


@pytest.mark.parametrize("architecture", DROPPED)
def test_paged_equals_resident_without_the_dropped_experts(dropped_of, golden, architecture):
    path, ids = dropped_of(architecture, (3, 8, 5)), golden[architecture][1]
    want = run_engine(make_engine(path), ids)
    bundle = Bundle.open(path)
    used = [bundle.config.top_k_of(layer) for layer in bundle.config.moe_layers]
    for slots in (1, max(used), len(bundle.experts)):
        for threads, chunk in ((1, 1), (2, 7), (3, 32)):
            engine = make_engine(path, slots=slots, threads=threads)
            assert same_bits(run_engine(engine, ids, chunk), want), (slots, threads, chunk)
    # a slot for each record: none is read twice, and there is nothing else to read
    counters = engine.counters
    assert counters["expert_misses"] <= len(bundle.experts)
    assert counters["bytes_read"] <= bundle.expert_bytes
    assert counters["moe_tokens"] == len(ids) * len(used)
    tables = {layer: weights_of(path).trunk(f"layers.{layer}.router_table") for layer in looked_up(bundle)}
    wanted = 0
    for layer, top_k in zip(bundle.config.moe_layers, used, strict=True):
        left = (tables[layer][ids] >= 0).sum(1) if layer in tables else np.full(len(ids), top_k)
        wanted += np.minimum(left, top_k).sum()
    assert counters["experts_used"] == wanted


def test_rows_that_are_not_returned_change_nothing(mixed, golden):
    path, ids = mixed("qwen3_moe"), golden["qwen3_moe"][1].astype(np.int32)
    want = run_engine(make_engine(path), ids)
    engine = make_engine(path, slots=4)
    assert engine.forward(ids[:20], NOTHING).shape == (0, want.shape[1])
    assert same_bits(engine.forward(ids[20:29], LAST), want[28:29])
    assert same_bits(engine.forward(ids[29:], ALL), want[29:])
    assert engine.truncate(10) == engine.position == 10
    with pytest.raises(ValueError, match="there are not as many positions"):
        engine.truncate(11)
    assert same_bits(engine.forward(ids[10:], LAST), want[-1:])


def cap_between(path, share: float, **options) -> int:
    """A cap that lies `share` of the way from the floor to all experts resident, by this process's size now."""
    with Runtime(path, "8GB", 128, **options) as runtime:
        floor, resident = runtime.plan.floor_bytes, runtime.plan.resident_bytes
    return floor + int(share * (resident - floor))


@pytest.mark.parametrize("threads", [1, 2])
def test_every_cap_gives_the_same_logits_and_tokens(bundle_of, stdlib_ids, threads):
    path, options, seen = bundle_of("reference", bits=16), {"threads": threads, "logits_rows": 16}, []
    with Runtime(path, "8GB", 128, threads=1, logits_rows=16) as runtime:
        assert runtime.plan.resident
        logits, answer = runtime.logits(stdlib_ids[:60]), runtime.generate(stdlib_ids[:50], 30)
    for share in (0.1, 0.4, 0.7, 0.9):  # not 0: a process's size moves by some 100 kB between two looks
        with Runtime(path, cap_between(path, share, **options), 128, **options) as runtime:
            seen.append(runtime.plan.slots)
            assert not runtime.plan.resident
            assert same_bits(runtime.logits(stdlib_ids[:60]), logits)
            paged_answer = runtime.generate(stdlib_ids[:50], 30)
            assert paged_answer.tokens == answer.tokens
            assert paged_answer.expert_misses > 0
    assert 4 <= min(seen) < max(seen) < 64


def test_every_cap_gives_the_same_answer_without_the_dropped_experts(tmp_path, stdlib_ids):
    checkpoint = Checkpoint(REFERENCE)
    kept = (tuple(range(16)), (1, 5, 9), tuple(range(0, 16, 2)), (0, 1, 14, 15))
    config = replace(checkpoint.config, kept=kept, layer_top_k=(2, 1, 3, 2))
    experts = {(layer, index): Packing((16,) * 3, 32) for layer in range(4) for index in range(len(kept[layer]))}
    trunk = trunk_packing(trunk_shapes(config), 8, 64)
    path = write_bundle(tmp_path / "dropped.emoe", REFERENCE, config, Kept(checkpoint, config), trunk, experts)
    with Runtime(path, "8GB", 128, threads=1) as runtime:
        assert runtime.plan.resident
        assert runtime.plan.all_experts_bytes == 31 * runtime.plan.slot_bytes
        answer = runtime.generate(stdlib_ids[:50], 30)
        assert answer.experts_used == (2 + 1 + 3 + 2) / 4
    for share in (0.2, 0.6):
        with Runtime(path, cap_between(path, share, threads=2), 128, threads=2) as runtime:
            assert 3 <= runtime.plan.slots < 31
            paged = runtime.generate(stdlib_ids[:50], 30)
            assert paged.tokens == answer.tokens
            assert paged.expert_misses > 0


def test_a_reused_prefix_gives_the_same_answer_as_a_fresh_run(bundle_of, stdlib_ids):
    path, fresh = bundle_of("reference", bits=16), []
    prompts = [stdlib_ids[:40], stdlib_ids[:41], stdlib_ids[:20] + stdlib_ids[500:520], stdlib_ids[:40]]
    for prompt in prompts:
        with Runtime(path, "8GB", 128, threads=1) as runtime:
            fresh.append(runtime.generate(prompt, 20).tokens)
    with Runtime(path, cap_between(path, 0.4, threads=2), 128, threads=2) as runtime:
        assert [runtime.generate(prompt, 20).tokens for prompt in prompts] == fresh


# ---- G3: every instruction set gives the same bits


@pytest.mark.skipif(not FAST_SETS, reason="this machine has the scalar kernels alone")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_set_gives_the_same_logits_at_mixed_widths(mixed, golden, architecture):
    ids = golden[architecture][1]
    want = logits_of(mixed(architecture), ids, kernels="scalar", threads=1)
    for name in FAST_SETS:
        assert same_bits(logits_of(mixed(architecture), ids, kernels=name, threads=2), want), name


@pytest.mark.skipif(not FAST_SETS, reason="this machine has the scalar kernels alone")
@pytest.mark.parametrize("width", _core.WIDTHS)
def test_every_kernel_set_gives_the_same_logits_at_every_width(bundle_of, stdlib_ids, width):
    path = bundle_of("reference", width=width, trunk_width=width)
    want = logits_of(path, stdlib_ids[:24], kernels="scalar")
    for name in FAST_SETS:
        assert same_bits(logits_of(path, stdlib_ids[:24], kernels=name), want), name


# ---- G4 and what running loads


FLOOR = "import sys; from edge_moe import Runtime; print(Runtime(sys.argv[1], '8GB', 256).plan.floor_bytes)"
CAPPED = """
import json, sys
from edge_moe import Runtime
with Runtime(sys.argv[1], int(sys.argv[2]), 256, logits_rows=int(sys.argv[3])) as runtime:
    answer = runtime.generate("import os" * 40, 60, temperature=0.8, top_p=0.9, seed=1)
    runtime.logits(range(200))
    text = "".join(piece.text for piece in runtime.stream("def ", 20))
with open("/proc/self/status") as status:
    counted = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")][0]
heavy = {"torch", "transformers", "scipy", "safetensors", "rich", "typer", "mlx", "huggingface_hub"}
print(json.dumps([counted, runtime.plan.slots, answer.peak_memory_bytes, sorted(heavy & sys.modules.keys())]))
"""


@pytest.mark.skipif(not _core.peak_bytes(), reason="needs /proc")
@pytest.mark.parametrize("extra_mb", [1, 10])
def test_the_process_never_exceeds_its_cap(bundle_of, extra_mb):
    path = bundle_of("reference", bits=16)
    # A process's own memory differs by up to 1 MB from one start to the next, so the floor of the last is not enough.
    cap = int(run_python(FLOOR, path).stdout) + extra_mb * 1_000_000
    counted, slots, reported, _ = json.loads(run_python(CAPPED, path, cap, 1).stdout)
    assert 4 <= slots < 64
    assert reported <= counted <= cap


@pytest.mark.skipif(not _core.peak_bytes(), reason="needs /proc")
def test_running_a_bundle_loads_no_heavy_module(bundle_of):
    assert json.loads(run_python(CAPPED, bundle_of("reference", width=4), 10**9, 8).stdout)[3] == []
