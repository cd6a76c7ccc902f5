"""The gates on device cuda: logits equal transformers', and are the processor's bit for bit however experts come.

They need a build with CUDA code and a GPU, or one whose GPU is simulated: tests/test_cuda.py makes that, and runs them.
"""

import errno
import json

import numpy as np
import pytest
from bundles import (
    ALL,
    LAST,
    Request,
    load_positions,
    logits_of,
    make_engine,
    mask_routers_of,
    prunable,
    routers_of,
    run_engine,
    run_on,
    run_python,
    run_together,
    same_bits,
    saved_positions,
    with_output_bias,
    write_lossless,
)
from golden_checkpoints import ARCHITECTURES, CHECKPOINTS, DROPPED, FAMILIES
from quantised_checkpoints import write_gpt_oss

from edge_moe import _core, compress
from edge_moe.bench.synthetic import make_synthetic
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.engine_config import KV_TYPES
from edge_moe.runtime.runtime import Runtime

SIMULATED = _core.cuda_build() == "simulated"
pytestmark = pytest.mark.skipif(_core.cuda_build() == "none", reason="needs a build with code for NVIDIA GPUs")


# ---- G1, G2: the logits of transformers, and the bits of the processor


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_lossless_logits_equal_those_of_transformers(golden, tmp_path, name):
    directory, ids, want = golden[name]
    checkpoint = Checkpoint(directory)
    path = write_lossless(tmp_path / "lossless.emoe", directory, checkpoint.config, checkpoint)
    got = logits_of(path, ids, device="cuda")
    assert np.abs(got - want).max() <= 1e-4
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
    assert same_bits(got, logits_of(path, ids))


@pytest.mark.parametrize("kv", KV_TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_slots_and_chunks_give_the_processors_bits(mixed, golden, architecture, kv):
    path, ids = mixed(architecture), golden[architecture][1]
    bundle = Bundle.open(path)
    want = run_engine(make_engine(path, kv=kv), ids)
    top_k, records = bundle.config.top_k, len(bundle.experts)
    for slots, chunk, graphs in ((None, 32, True), (top_k, 1, True), (records // 2, 7, True), (top_k + 1, 1, False)):
        engine = make_engine(path, slots=slots, kv=kv, device="cuda", graphs=graphs)
        assert engine.kernels == "cuda"
        assert same_bits(run_engine(engine, ids, chunk), want), (slots, chunk, graphs)
        assert engine.counters["expert_misses"] > 0
    engine = make_engine(path, slots=top_k + 1, kv=kv, device="cuda")
    engine.set_prefetch(False)
    assert same_bits(run_engine(engine, ids[:12], 1), want[:12])


@pytest.mark.parametrize("width", [4, 16])
def test_output_biases_of_experts_give_the_processors_bits(golden, tmp_path, monkeypatch, width):
    path, ids = with_output_bias(golden, tmp_path, monkeypatch, width), golden["olmoe"][1]
    want = run_engine(make_engine(path), ids)
    for slots, chunk in ((None, 32), (4, 1), (5, 7)):
        assert same_bits(run_engine(make_engine(path, slots=slots, device="cuda"), ids, chunk), want), (slots, chunk)


def test_kept_codes_give_the_processors_bits(golden, tmp_path):
    write_gpt_oss(golden["gpt_oss"][0], tmp_path / "source")
    path, ids = compress(tmp_path / "source", tmp_path / "kept.emoe", method="keep").path, golden["gpt_oss"][1]
    want = run_engine(make_engine(path), ids)
    for slots, chunk in ((None, 32), (3, 1), (4, 7)):
        assert same_bits(run_engine(make_engine(path, slots=slots, device="cuda"), ids, chunk), want), (slots, chunk)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_processors_bits_paged_and_several_at_once(mixed, golden, name):
    path, ids, logits = mixed(name), golden[name][1], golden[name][2]
    want, top_k = run_engine(make_engine(path), ids), Bundle.open(path).config.top_k
    for slots, chunk in ((top_k, 1), (top_k + 1, 7)):
        assert same_bits(run_engine(make_engine(path, slots=slots, device="cuda"), ids, chunk), want)
    random = np.random.default_rng(4)
    asked = [Request(random.integers(0, logits.shape[1], 5 + 4 * i), 1 + 4 * (i % 2), 0) for i in range(2)]
    engine = make_engine(path, sequences=2, slots=top_k + 1, device="cuda")
    for request, got in zip(asked, run_together(engine, asked, 2), strict=True):
        assert same_bits(got, run_engine(make_engine(path), request.ids, request.chunk))


def test_memory_that_is_lowered_and_raised_changes_no_bit(mixed, golden):
    path, ids = mixed("olmoe"), golden["olmoe"][1]
    opened = Bundle.open(path)
    largest = max(expert.nbytes for expert in opened.experts.values())
    want = run_engine(make_engine(path), ids)
    engine = make_engine(path, device="cuda")
    for nbytes in (opened.expert_bytes, 9 * largest, 5 * largest, 12 * largest, opened.expert_bytes):
        engine.resize_slots(nbytes)
        assert same_bits(run_engine(engine, ids, 5), want)
        assert engine.counters["records_held"] * min(e.nbytes for e in opened.experts.values()) <= nbytes
    with pytest.raises(ValueError, match="the slots must hold the largest record"):
        engine.resize_slots(largest - 1)
    assert same_bits(run_engine(engine, ids, 5), want)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_sequences_give_the_processors_bits(mixed, golden, architecture, graphs):
    path, random = mixed(architecture), np.random.default_rng(2)
    vocab, top_k = golden[architecture][2].shape[1], Bundle.open(path).config.top_k
    asked = [Request(random.integers(0, vocab, 5 + 4 * i), 1 + 4 * (i % 2), i // 2) for i in range(5)]
    engine = make_engine(path, sequences=3, slots=top_k + 1, device="cuda", graphs=graphs)
    for request, got in zip(asked, run_together(engine, asked, 3), strict=True):
        assert same_bits(got, run_engine(make_engine(path), request.ids, request.chunk))


@pytest.mark.parametrize("name", ["qwen4_exp", "deepseek_v4"])
@pytest.mark.parametrize("chunk, graphs", [(128, True), (1, True), (33, False)])
def test_blocks_are_chosen_as_by_the_processor_in_long_sequences(mixed, name, chunk, graphs):
    """Beyond the positions that the first graph of a layer serves."""
    path, ids = mixed(name), np.random.default_rng(6).integers(0, 128, 200).astype(np.int32)
    want = run_engine(make_engine(path, context=208, chunk=128), ids, 128)
    engine = make_engine(path, context=208, chunk=128, device="cuda", graphs=graphs)
    assert same_bits(run_engine(engine, ids, chunk), want)


def test_positions_are_chosen_as_by_the_processor_in_long_rewound_and_copied_sequences(mixed, golden):
    """Beyond the positions that the first graph of a layer serves."""
    path = mixed("glm_moe_dsa")
    ids = np.random.default_rng(6).integers(0, 128, 260).astype(np.int32)
    options = {"context": 270, "sequences": 2, "chunk": 128}
    want, top_k = run_engine(make_engine(path, **options), ids, 128), Bundle.open(path).config.top_k
    engine = make_engine(path, slots=top_k + 1, device="cuda", **options)
    assert same_bits(run_engine(engine, ids[:252], 126), want[:252])
    engine.copy_positions(0, 1, 67)
    assert same_bits(engine.forward(ids[67:79], ALL, sequence=1), want[67:79])
    for first, end in ((252, 260), (10, 18)):
        assert engine.truncate(first) == first
        rows = [engine.forward(ids[at : at + 1], ALL) for at in range(first, end)]
        assert same_bits(np.concatenate(rows), want[first:end])


@pytest.mark.parametrize(
    "name, graphs",
    [(name, graphs) for name in ("qwen3_next", "deepseek_v4") for graphs in (True, False)] + [("qwen4_exp_text", True)],
)
def test_recurrent_states_are_rewound_and_copied(mixed, golden, name, graphs):
    path, ids = mixed(name), golden[name][1].astype(np.int32)
    want, top_k = run_engine(make_engine(path), ids), Bundle.open(path).config.top_k
    engine = make_engine(path, slots=top_k + 1, sequences=2, snapshots=2, device="cuda", graphs=graphs)
    engine.forward(ids[:7], LAST)
    engine.snapshot()
    for at in range(7, 12):
        engine.forward(ids[at : at + 1], LAST)
    assert engine.truncate(10) == 7
    assert same_bits(np.concatenate([engine.forward(ids[at : at + 1], ALL) for at in range(7, 14)]), want[7:14])
    engine.copy_positions(0, 1, 14)
    assert same_bits(engine.forward(ids[14:], ALL, sequence=1), want[14:])
    engine.copy_positions(0, 1, 7)
    assert same_bits(engine.forward(ids[7:], ALL, sequence=1), want[7:])
    engine.inject("error", after=2)
    with pytest.raises(OSError):
        engine.forward(ids[14:], ALL)
    engine.clear_faults()
    assert same_bits(engine.forward(ids[14:], ALL), want[14:])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_windows_are_kept_rewound_and_copied(mixed, golden, name):
    path, vocab = mixed(name), golden[name][2].shape[1]
    ids = np.random.default_rng(2).integers(0, vocab, 90).astype(np.int32)
    want = run_engine(make_engine(path, context=96, chunk=96), ids, 96)

    def run(first: int, last: int, sequence: int = 0) -> np.ndarray:
        steps = range(first, last, 16)
        return np.concatenate([engine.forward(ids[at : min(at + 16, last)], ALL, sequence=sequence) for at in steps])

    engine = make_engine(path, context=96, chunk=16, sequences=2, snapshots=1, device="cuda")
    assert same_bits(run(0, 40), want[:40])
    engine.snapshot()
    assert same_bits(run(40, 75), want[40:75])
    assert same_bits(np.concatenate([engine.forward(ids[at : at + 1], ALL) for at in range(75, 80)]), want[75:80])
    assert engine.truncate(77) == 77
    engine.copy_positions(0, 1, 77)
    assert same_bits(run(77, 90, 1), want[77:])
    assert engine.truncate(50) == 40
    assert same_bits(run(40, 90), want[40:])


@pytest.mark.parametrize("architecture", ["olmoe", "deepseek_v3"])
def test_positions_are_copied_to_another_sequence(mixed, golden, architecture):
    path, ids = mixed(architecture), golden[architecture][1].astype(np.int32)
    engine, want = make_engine(path, sequences=2, device="cuda"), run_engine(make_engine(path), ids)
    engine.forward(ids[:20], LAST)
    engine.copy_positions(0, 1, 18)
    assert same_bits(engine.forward(ids[18:], ALL, sequence=1), want[18:])
    assert same_bits(engine.forward(ids[20:], ALL), want[20:])


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v4"])
def test_positions_that_either_device_saved_go_on_on_the_other(mixed, name):
    path, ids = mixed(name), np.random.default_rng(2).integers(0, 128, 90).astype(np.int32)
    processor, gpu = (make_engine(path, context=96, chunk=16, device=its) for its in ("cpu", "cuda"))
    want = run_engine(processor, ids, 16)
    for one, other in ((processor, gpu), (gpu, processor)):
        run_engine(one, ids[:50], 16)
        load_positions(other, ids[:50], saved_positions(one, 50))
        assert same_bits(run_on(other, ids[50:]), want[50:])


@pytest.mark.parametrize("width", _core.WIDTHS)
def test_every_width_gives_the_processors_bits(bundle_of, stdlib_ids, width):
    path = bundle_of("reference", width=width, trunk_width=width)
    want = logits_of(path, stdlib_ids[:6])
    assert same_bits(logits_of(path, stdlib_ids[:6], device="cuda"), want)


@pytest.mark.parametrize("architecture", DROPPED)
def test_a_bundle_without_the_dropped_experts_gives_the_processors_bits(dropped_of, golden, architecture):
    path, ids = dropped_of(architecture, (3, 8, 5)), golden[architecture][1][:16]
    want = run_engine(make_engine(path), ids)
    assert same_bits(run_engine(make_engine(path, slots=4, device="cuda"), ids, 5), want)


def test_a_long_context_gives_the_processors_bits(tmp_path):
    """Longer than a graph's first positions and than the tokens whose scores are computed at once, by a window too."""
    config = {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024}
    config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64}
    config |= {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "norm_topk_prob": True, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = make_synthetic(tmp_path, tmp_path / "random.emoe", width=4).path
    ids = np.random.default_rng(5).integers(0, 64, 270).astype(np.int32)
    engines = [make_engine(path, device=device, context=300, chunk=250) for device in ("cpu", "cuda")]
    assert same_bits(*[engine.forward(ids[:250], LAST) for engine in engines])
    for token in ids[250:]:
        assert same_bits(*[engine.forward(np.array([token]), LAST) for engine in engines])


# ---- G5: pruning


@pytest.fixture(scope="module")
def prunable_bundle(golden, tmp_path_factory):
    source = golden["olmoe"][0]
    return prunable(tmp_path_factory.mktemp("pruned") / "b.emoe", source, mask_routers_of(Checkpoint(source).config))


@pytest.mark.parametrize(
    ("rule", "protect"), [("ratio", 0.0), ("ratio", 0.1), ("share", 0.0), ("otp", 0.0), ("loss", 0.0)]
)
def test_pruned_tokens_give_the_processors_bits(prunable_bundle, rule, protect):
    routers = {name: routers_of(prunable_bundle, name) for name in ("otp", "loss")}
    ids, seen = np.arange(1, 25), []
    for device, slots, chunk in (("cpu", None, 24), ("cuda", None, 24), ("cuda", 3, 24), ("cuda", 3, 1)):
        engine = make_engine(prunable_bundle, slots=slots, device=device, **routers)
        engine.set_prune(rule, [0.6, 0.7] if rule in ("ratio", "share") else [], 0.2, protect)
        seen.append((run_engine(engine, ids, chunk), engine.counters["experts_used"]))
    seen = seen[: 3 if protect else 4]  # which tokens are protected depends on the chunk
    assert all(same_bits(logits, seen[0][0]) and used == seen[0][1] for logits, used in seen)
    assert seen[0][1] < 24 * 2 * Bundle.open(prunable_bundle).config.top_k


# ---- errors, and all goes on


def test_a_failed_read_is_an_error_and_the_next_try_is_whole(bundle_of, golden):
    path, ids = bundle_of("olmoe", width=4), golden["olmoe"][1][:12]
    want = run_engine(make_engine(path), ids)
    engine = make_engine(path, slots=5, device="cuda")
    engine.inject("error", after=7, times=1)
    with pytest.raises(OSError, match="try again"):
        run_engine(engine, ids, 1)
    assert engine.faults_met == 1
    assert same_bits(run_engine(engine, ids, 1), want)
    engine.inject("flip", after=3, times=1)
    with pytest.raises(_core.DamagedFile, match="checksum"):
        run_engine(engine, ids, 4)
    assert same_bits(run_engine(engine, ids, 4), want)


@pytest.mark.skipif(not SIMULATED, reason="a real GPU's memory is what it is")
def test_memory_that_cannot_be_read_to_is_filled_through_a_buffer(bundle_of, golden):
    path, ids = bundle_of("olmoe", width=4), golden["olmoe"][1][:12]
    engine = make_engine(path, slots=5, device="cuda")
    engine.inject("error", after=3, times=1, value=errno.EFAULT)
    assert same_bits(run_engine(engine, ids, 1), run_engine(make_engine(path), ids))
    assert engine.faults_met == 1


# ---- G4: a Runtime under a cap

FLOOR = "import sys; from edge_moe import Runtime; print(Runtime(sys.argv[1], '8GB', 256, 'cuda').plan.floor_bytes)"
CAPPED = """
import json, sys
from edge_moe import Runtime
with Runtime(sys.argv[1], int(sys.argv[2]), 256, "cuda") as runtime:
    answer = runtime.generate("import os", 10)
    in_place = runtime._engine.in_place
print(json.dumps([answer.tokens, in_place, answer.peak_memory_bytes, runtime.plan.slots, answer.expert_misses]))
"""


@pytest.mark.parametrize("discrete", [False, True])
def test_a_runtime_keeps_its_cap_and_gives_the_same_answer(bundle_of, monkeypatch, discrete):
    if discrete:
        if not SIMULATED:
            pytest.skip("a real GPU is what it is")
        monkeypatch.setenv("EDGE_MOE_SIMULATE_DISCRETE", "1")
    path = bundle_of("reference", bits=16)
    with Runtime(path, "8GB", 256, "cpu", threads=1) as runtime:
        assert runtime._engine.in_place
        want = runtime.generate("import os", 10)
    cap = int(run_python(FLOOR, path).stdout) + 4_000_000
    tokens, in_place, peak, slots, misses = json.loads(run_python(CAPPED, path, cap).stdout)
    assert tokens == want.tokens
    assert in_place != discrete or not SIMULATED
    assert peak <= cap
    assert 4 <= slots < 64 and misses > 0
