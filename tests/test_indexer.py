"""Sparse attention: an indexer chooses the positions, the same ones however a prompt is computed."""

from dataclasses import replace

import numpy as np
import pytest
from bundles import ALL, LAST, check_rewinds, logits_of, make_engine, run_engine, run_on, same_bits, write_lossless
from golden_checkpoints import write_checkpoint
from quantised_checkpoints import write_fp8, write_plain
from test_sequences import alone, requests

from edge_moe import _core
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config_file import parse_config
from edge_moe.runtime.engine_config import KV_TYPES, engine_config, engine_memory
from edge_moe.runtime.layers.indexer import Choice, chosen
from edge_moe.runtime.runtime import Runtime

CONTEXT = 300
NAMES = ("deepseek_v32", "glm_moe_dsa")  # an indexer in all layers, and in every other


@pytest.fixture(params=NAMES)
def sparse(request, mixed, golden):
    """A bundle, 280 token ids, more than the indexer scores at a time, and their logits, computed in one step."""
    path, vocab = mixed(request.param), golden[request.param][2].shape[1]
    ids = np.random.default_rng(2).integers(0, vocab, 280).astype(np.int32)
    return path, ids, run_engine(make_engine(path, context=CONTEXT, chunk=CONTEXT), ids, CONTEXT)


@pytest.mark.parametrize("name", NAMES)
def test_a_long_prompt_has_the_logits_of_the_reference(golden, tmp_path, name):
    directory = golden[name][0]
    checkpoint = Checkpoint(directory)
    path = write_lossless(tmp_path / "lossless.emoe", directory, checkpoint.config, checkpoint)
    ids = np.random.default_rng(3).integers(0, 128, 280)
    got = run_engine(make_engine(path, context=CONTEXT), ids)
    assert np.abs(got - reference.forward(checkpoint.config, checkpoint, ids)).max() <= 1e-4


@pytest.mark.parametrize("kv", KV_TYPES)
def test_kernels_steps_and_threads_change_no_bit(sparse, kv):
    path, ids, want = sparse
    if kv == "float16":
        want = run_engine(make_engine(path, context=CONTEXT, chunk=CONTEXT, kv=kv), ids, CONTEXT)
    for kernels in _core.kernel_names():
        for chunk, threads in ((7, 3), (64, 2)):
            engine = make_engine(path, context=CONTEXT, chunk=chunk, threads=threads, kv=kv, kernels=kernels)
            assert same_bits(run_engine(engine, ids, chunk), want)
    assert same_bits(run_engine(make_engine(path, context=CONTEXT, threads=2, kv=kv), ids, 1), want)


def test_random_steps_and_rewinds_change_no_bit(sparse):
    path, ids, want = sparse
    check_rewinds(make_engine(path, context=CONTEXT, chunk=32), ids, want, seed=1, steps=40, chunk=32)


def test_a_prefix_is_copied_with_the_keys_of_the_indexer(sparse):
    path, ids, want = sparse
    engine = make_engine(path, context=CONTEXT, chunk=32, sequences=2)
    for at in range(0, 256, 32):
        engine.forward(ids[at : at + 32], LAST)
    for positions in (256, 131, 9, 0):
        engine.copy_positions(0, 1, positions)
        assert same_bits(run_on(engine, ids[positions:], sequence=1), want[positions:])


def test_a_step_that_fails_leaves_the_choice_of_the_next_as_it_was(sparse):
    path, ids, want = sparse
    engine = make_engine(path, context=CONTEXT, chunk=16, slots=Bundle.open(path).config.top_k)
    run_on(engine, ids[:70])
    engine.inject("error", after=3)
    with pytest.raises(OSError):
        engine.forward(ids[70:86], ALL)
    engine.clear_faults()
    assert same_bits(run_on(engine, ids[70:]), want[70:])


def test_sequences_choose_for_themselves(sparse):
    path, _, _ = sparse
    asked = requests(128, 3, seed=5)
    engine = make_engine(path, context=CONTEXT, chunk=128, sequences=3)
    longest = max(len(request.ids) for request in asked)
    for _ in range(2):  # the second time after what the first has left
        rows = engine.step([(i, np.asarray(request.ids, np.int32), ALL) for i, request in enumerate(asked)])
        assert longest > Bundle.open(path).config.attention.top
        for request in asked:
            assert same_bits(rows[: len(request.ids)], alone(path, request, context=CONTEXT))
            rows = rows[len(request.ids) :]
        for i in range(3):
            engine.truncate(0, sequence=i)


def test_a_context_that_the_choice_covers_has_the_bits_of_a_longer_one_without_its_cache(sparse):
    path, ids, want = sparse
    config = Bundle.open(path).config
    top = config.attention.top
    for context in (top, top + 1):
        assert same_bits(run_engine(make_engine(path, context=context), ids[:context]), want[:context])
    dense = replace(config, layers=tuple(replace(one, attention=without_top(one)) for one in config.layers))
    assert engine_memory(config, top, 4)[0] == engine_memory(dense, top, 4)[0]
    for part in (0, 2):  # keys, and scratch memory for the choice
        assert engine_memory(config, top + 3, 4)[part] > engine_memory(dense, top + 3, 4)[part]


def without_top(layer):
    return replace(layer.attention, top=0, indexer=None)


@pytest.mark.parametrize("kv", KV_TYPES)
def test_the_plan_counts_the_keys_of_every_indexer(mixed, kv):
    nbytes = {"float32": 4, "float16": 2}[kv]
    for name, indexers, dim in (("deepseek_v32", 3, 28), ("glm_moe_dsa", 2, 20)):
        config = Bundle.open(mixed(name)).config
        dense = replace(config, layers=tuple(replace(one, attention=without_top(one)) for one in config.layers))
        sparse, latents = (engine_memory(its, 256, 4, kv=kv, sequences=2)[0] for its in (config, dense))
        assert sparse - latents == 2 * indexers * 256 * dim * nbytes
        assert latents == 2 * config.layer_count * 256 * config.attention.cached * nbytes


@pytest.mark.parametrize("weight", [0.0, -0.0])
def test_ties_go_to_the_lower_position(golden, tmp_path, weight):
    """If the indexer's heads weigh nothing, all positions score alike, and the first ones are chosen."""
    directory = golden["glm_moe_dsa"][0]

    class Indifferent(Checkpoint):
        def trunk(self, name):
            values = super().trunk(name)
            return np.full_like(values, weight) if name.endswith("index.weights") else values

    weights, ids = Indifferent(directory), np.random.default_rng(3).integers(0, 128, 60)
    top = weights.config.attention.top
    first = np.broadcast_to((np.arange(60) < top) & np.tri(60, dtype=bool), (1, 60, 60))
    assert np.array_equal(chosen(np.full((1, 60, 60), weight, np.float32), top), first)
    x, choice = reference.embed(weights.config, weights, ids[None]), Choice()
    reference.attention_block(weights.config, weights, 0, x, choice=choice)
    assert np.array_equal(choice.visible, first)
    path = write_lossless(tmp_path / "lossless.emoe", directory, weights.config, weights)
    want = reference.forward(weights.config, weights, ids)
    assert np.abs(logits_of(path, ids) - want).max() <= 1e-4


def test_the_tensors_of_an_indexer_are_read_in_fp8(tmp_path):
    source, _, _ = write_checkpoint("deepseek_v32", tmp_path / "source")
    values = write_fp8(source, tmp_path / "fp8")
    write_plain(source, tmp_path / "plain", values, "F32")
    checkpoint, plain = Checkpoint(tmp_path / "fp8"), Checkpoint(tmp_path / "plain")
    for layer in range(checkpoint.config.layer_count):
        for part in ("q", "k", "k_norm", "k_norm_bias", "weights"):
            name = f"layers.{layer}.index.{part}"
            assert np.array_equal(checkpoint.trunk(name), plain.trunk(name))
    assert checkpoint.dtype("layers.0.index.q") == checkpoint.dtype("layers.0.index.k") == "F8_E4M3"


def test_an_answer_beyond_the_choice_is_the_same_in_later_turns(mixed, golden):
    path, ids = mixed("deepseek_v32"), golden["deepseek_v32"][1].tolist()
    with Runtime(path, context=128) as runtime:
        first = runtime.generate(ids, 20)
        runtime.generate(ids[:20], 20)
        again = runtime.generate(ids, 20)
    assert first.tokens == again.tokens
    assert runtime.plan.kv_cache_bytes == engine_memory(Bundle.open(path).config, 128, 1)[0]


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, "FFFFFF"),
        ({"index_topk_freq": 1}, "FFFFFF"),
        ({"index_topk_freq": 3}, "FFSSFS"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 4}, "FFFFSF"),
        ({"index_topk_pattern": "FSSFSS"}, "FSSFSS"),
        ({"index_topk_pattern": ["full", "full", "shared", "shared", "full", "full"]}, "FFSSFF"),
        ({"indexer_types": ["full", "shared"] * 3, "index_topk_pattern": "FFFFFF"}, "FSFSFS"),
    ],
)
def test_layers_without_an_indexer_are_those_of_transformers(changes, kinds):
    config = parse_config({**GLM, **changes})
    assert "".join("F" if layer.attention.indexer else "S" for layer in config.layers) == kinds
    assert all(layer.attention.top == 2048 for layer in config.layers)
    assert engine_config(config, 2048, 1).attentions[0].index_top == 0
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model("glm_moe_dsa", num_hidden_layers=6, **changes)
    assert "".join(kind[0].upper() for kind in theirs.indexer_types) == kinds


GLM = {
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": None}, "q_lora_rank is null, but the indexer of glm_moe_dsa needs queries' latents"),
        ({"rope_interleave": False}, "rope_interleave false is not supported for glm_moe_dsa"),
        ({"indexer_rope_interleave": False}, "indexer_rope_interleave false is not supported for glm_moe_dsa"),
        (
            {"model_type": "deepseek_v32", "indexer_rope_interleave": True},
            "indexer_rope_interleave true is not supported for deepseek_v32",
        ),
        ({"index_topk": 0}, "index_topk is 0, expected a whole number from 1 to 2,147,483,647"),
        ({"index_head_dim": 4}, "qk_rope_head_dim is larger than index_head_dim"),
        ({"indexer_types": ["full"]}, "indexer_types is ['full'], expected full or shared for every layer"),
        ({"index_topk_pattern": "FFXFFF"}, "index_topk_pattern is 'FFXFFF', expected full or shared for every layer"),
        (
            {"index_topk_pattern": "SFFFFF"},
            "index_topk_pattern is shared for layer 0, which no layer precedes that chooses positions",
        ),
        ({"index_topk_freq": 0.5}, "index_topk_freq is 0.5, expected a whole number from 0"),
    ],
)
def test_what_an_indexer_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        parse_config({**GLM, **changes})
    assert str(error.value) == f"config.json: {message}"
