"""DeepSeek-V4's config.json in every spelling, its tensors' names on the hub, and its tables of experts."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE, Kept, assert_logits_of_transformers
from test_checkpoint import read_file, write_file

from edge_moe.compressor.rounding.round_layers import cut_router
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.config import ModelConfig
from edge_moe.runtime.config_file import parse_config, read_json
from edge_moe.runtime.layers.compressed import CompressedAttention

NAME = "deepseek_v4"
FLASH = read_json(REFERENCE.parent / "configs" / "deepseek-v4-flash.json")
SMALL = {
    "model_type": NAME,
    "vocab_size": 128,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128},
}


def kinds_of(config: ModelConfig) -> str:
    """W, S or H for each layer: a window, compressed rows that are chosen, or all of them."""
    return "".join("S" if its.index else "H" if its.rate else "W" for its in (one.attention for one in config.layers))


# ---- config.json


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compress_ratios": [0, 4, 128, 0, 0]},
        {"layer_types": ["sliding_attention", "compressed_sparse_attention"] * 2},
        {"num_hash_layers": 0},
        {"num_hash_layers": 9},
        {"mlp_layer_types": ["moe", "hash_moe", "moe", "hash_moe"]},
        {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 16}},
        {"compress_rate_csa": 8},
        {"compress_rate_hca": 64, "compress_rope_theta": 1000.0, "rope_theta": 500.0},
        {"qk_rope_head_dim": None, "partial_rotary_factor": 0.5},
        {"qk_rope_head_dim": None, "head_dim": 64},
        {"partial_rotary_factor": 0.25},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.3,
                          "original_max_position_embeddings": 64, "beta_fast": 6}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"scoring_func": "sigmoid", "n_shared_experts": 2, "routed_scaling_factor": 2.5},
        {"hc_mult": 2, "hc_sinkhorn_iters": 3, "hc_eps": 1e-4, "swiglu_limit": 7.0},
    ],
)  # fmt: skip
def test_a_config_means_what_it_means_to_transformers(changes):
    """As the hub spells it and as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    raw = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw)))
    assert parse_config(raw) == parse_config(theirs.to_dict())
    found = parse_config(raw)
    of_type = {"W": "sliding_attention", "S": "compressed_sparse_attention", "H": "heavily_compressed_attention"}
    assert [of_type[kind] for kind in kinds_of(found)] == theirs.layer_types
    assert [found.is_hashed(at) for at in range(4)] == [kind == "hash_moe" for kind in theirs.mlp_layer_types]
    for layer, kind in zip(found.layers, theirs.layer_types, strict=True):
        assert layer.attention.rate == theirs.compress_rates.get(kind, 0)
        assert layer.attention.rope.dim == theirs.qk_rope_head_dim


def test_flash_has_the_layers_and_sizes_that_are_published():
    config = parse_config(FLASH)
    assert kinds_of(config) == "WWS" + "HS" * 20
    assert [config.is_hashed(layer) for layer in range(5)] == [True] * 3 + [False] * 2
    by_kind = dict(zip(kinds_of(config), (layer.attention for layer in config.layers), strict=True))
    assert [by_kind[kind].rate for kind in "WSH"] == [0, 4, 128]
    assert by_kind["W"].rope.theta == 10_000 and by_kind["W"].rope.yarn is None
    for kind in "SH":
        rope = by_kind[kind].rope
        assert (rope.theta, rope.yarn.factor, rope.scale, rope.dim) == (160_000, 16, 1.0, 64)
    assert by_kind["S"].softmax_scale == 512**-0.5
    assert by_kind["S"].index.scale == pytest.approx(128**-0.5 * 64**-0.5)
    assert config.width == 4 * 4096 and config.routing_scale == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, supported for deepseek_v4 is 1"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False, supported for deepseek_v4 is True"),
        ({"mlp_bias": True}, "mlp_bias is True, supported for deepseek_v4 is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported for deepseek_v4 is 'silu'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy', supported for deepseek_v4 is 'noaux_tc'"),
        (
            {"attention_bias": True},
            "attention_bias true is not supported for deepseek_v4 (it biases the output projection too)",
        ),
        ({"scoring_func": "relu"}, "scoring_func is 'relu', supported are sqrtsoftplus, sigmoid, softmax"),
        (
            {"compress_ratios": [0, 4, 8, 4]},
            "compress_ratios is [0, 4, 8, 4], expected 0 or 4 or 128 for every layer",
        ),
        ({"compress_ratios": [0, 4]}, "compress_ratios is [0, 4], expected 0 or 4 or 128 for every layer"),
        (
            {"layer_types": ["full_attention"] * 4},
            "layer_types is ['full_attention', 'full_attention', 'full_attention', 'full_attention'], expected "
            "sliding_attention or compressed_sparse_attention or heavily_compressed_attention for every layer",
        ),
        (
            {"layer_types": ["sliding_attention"] * 4, "compress_ratios": [0, 0, 0, 4]},
            "layer_types is ['sliding_attention', 'sliding_attention', 'sliding_attention', 'sliding_attention'] and "
            "compress_ratios is ['sliding_attention', 'sliding_attention', 'sliding_attention', "
            "'compressed_sparse_attention'], two spellings of one key; remove the one that is wrong",
        ),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types is ['moe'], expected hash_moe or moe for every layer"),
        (
            {"mlp_layer_types": ["moe"] * 4, "num_hash_layers": 1},
            "mlp_layer_types is ['moe', 'moe', 'moe', 'moe'] and num_hash_layers is ['hash_moe', 'moe', 'moe', 'moe'], "
            "two spellings of one key; remove the one that is wrong",
        ),
        ({"num_hash_layers": -1}, "num_hash_layers is -1, expected a whole number from 0"),
        (
            {"compress_rates": {"compressed_sparse_attention": 0}},
            "compress_rates.compressed_sparse_attention is 0, expected a whole number from 1 to 2,147,483,647",
        ),
        ({"compress_rates": 4}, "compress_rates is 4, expected an object of kinds of layers and rates"),
        (
            {"compress_rates": {"heavily_compressed_attention": 64}, "compress_rate_hca": 32},
            "compress_rates.heavily_compressed_attention is 64 and compress_rate_hca is 32, two spellings of one key; "
            "remove the one that is wrong",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "partial_rotary_factor times head_dim is 16 and qk_rope_head_dim is 8, two spellings of one key; remove "
            "the one that is wrong",
        ),
        ({"qk_rope_head_dim": 7}, "the rotated dimensions of a head must be even"),
        ({"index_head_dim": 6}, "index_head_dim is smaller than the rotated dimensions of a head"),
        ({"o_groups": 3}, "num_attention_heads must be a multiple of o_groups"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0, expected a number above 0"),
        ({"hc_mult": 17}, "hc_mult is 17, expected a whole number from 1 to 16"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters is 0, expected a whole number from 1 to 1,000"),
        (
            {"rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 1e4}}},
            "rope_scaling replaces the main and compress of rope_parameters; remove the one that is wrong",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 1e4}}},
            "rope_parameters has no partial_rotary_factor for main",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
            "rope_theta is 10000.0 and rope_parameters.rope_theta is 77.0, two spellings of one key; remove the one "
            "that is wrong",
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4}},
            "rope type 'longrope' is not supported; supported are default, linear, yarn",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 0}},
            "attention_factor is 0, expected a number above 0",
        ),
    ],
)
def test_what_a_config_cannot_have_is_named(changes, message):
    with pytest.raises(ValueError) as error:
        parse_config({**SMALL, **changes})
    assert str(error.value) == f"config.json: {message}"


# ---- names


def as_on_the_hub(directory: Path) -> dict:
    """Rename what transformers wrote with the hub's names, where it has names of its own; gives the tensors."""
    path, renamed = directory / "model.safetensors", {}
    for key, tensor in read_file(path).items():
        key = key.removeprefix("model.").replace("embed_tokens", "embed").replace("hc_head.hc_", "hc_head_")
        renamed[re.sub(r"(layers\.\d+\.attn)\.norm", r"\1.kv_norm", key)] = tensor
    write_file(path, renamed)
    return renamed


def test_a_checkpoint_of_the_hub_gives_the_logits_of_transformers(tmp_path, golden):
    """With the layer that predicts a second token, which is left out."""
    directory, ids, want = golden[NAME]
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((directory / file).read_bytes())
    tensors = as_on_the_hub(tmp_path)
    assert {"embed.weight", "head.weight", "norm.weight", "hc_head_fn", "layers.1.attn.kv_norm.weight",
            "layers.1.attn.indexer.compressor.ape", "layers.0.ffn.gate.tid2eid"} <= tensors.keys()  # fmt: skip
    extra = {f"mtp.0.{key}": tensors[f"layers.4.{key}"] for key in ("attn.wkv.weight", "ffn.experts.0.w1.weight")}
    write_file(tmp_path / "model.safetensors", {**tensors, **extra})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.unused == list(extra)
    assert np.abs(reference.forward(checkpoint.config, checkpoint, ids) - want).max() <= 1e-4


def test_an_unknown_tensor_of_a_layer_is_refused(tmp_path, golden):
    directory = golden[NAME][0]
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    tensors = as_on_the_hub(tmp_path)
    stranger = {"layers.0.attn.compressor.ape": tensors["layers.1.attn.compressor.ape"]}
    write_file(tmp_path / "model.safetensors", {**tensors, **stranger})
    with pytest.raises(ValueError, match="tensor layers.0.attn.compressor.ape is there, which deepseek_v4 with this"):
        Checkpoint(tmp_path)


def test_a_model_whose_head_is_its_embedding_gives_the_logits_of_transformers(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import random_model

    random_model(NAME, seed=29, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).config.tied_head
    assert_logits_of_transformers(tmp_path)


# ---- tables of experts


TABLE = "model.layers.0.ffn.gate.tid2eid"


def with_table(golden, directory: Path, dtype: str, change) -> Path:
    """The checkpoint with another table of the first layer."""
    source = golden[NAME][0]
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    (directory / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    tensors = read_file(directory / "model.safetensors")
    _, shape, data = tensors[TABLE]
    table = np.frombuffer(data, "<i8").reshape(shape).copy()
    change(table)
    tensors[TABLE] = dtype, shape, table.astype({"I64": "<i8", "I32": "<i4", "F32": "<f4"}[dtype]).tobytes()
    write_file(directory / "model.safetensors", tensors)
    return directory


@pytest.mark.parametrize("dtype", ["I64", "I32"])
def test_a_table_may_have_integers_of_two_sizes(golden, tmp_path, dtype):
    directory = with_table(golden, tmp_path, dtype, lambda table: None)
    checkpoint, ids, want = Checkpoint(directory), *golden[NAME][1:]
    assert np.abs(reference.forward(checkpoint.config, checkpoint, ids) - want).max() <= 1e-4


def set_at(row: int, place: int, expert: int):
    def change(table: np.ndarray) -> None:
        table[row, place] = expert

    return change


def repeat(table: np.ndarray) -> None:
    table[17, 2] = table[17, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at(3, 1, 8), "has experts outside 0 to 7"),
        (set_at(3, 1, -1), "has experts outside 0 to 7"),
        (repeat, "has an expert twice for token 17"),
    ],
)
def test_a_damaged_table_is_refused(golden, tmp_path, change, message):
    checkpoint = Checkpoint(with_table(golden, tmp_path, "I64", change))
    with pytest.raises(ValueError) as error:
        checkpoint.trunk("layers.0.router_table")
    assert str(error.value) == f"tensor {TABLE} {message}; download the checkpoint again"


def test_a_table_of_real_numbers_is_refused(golden, tmp_path):
    directory = with_table(golden, tmp_path, "F32", lambda table: None)
    with pytest.raises(ValueError, match=f"tensor {TABLE} of type F32 in place of I32 or I64 is not supported"):
        Checkpoint(directory)


def test_a_table_gets_the_numbers_of_the_experts_that_are_kept(golden):
    checkpoint = Checkpoint(golden[NAME][0])
    config = replace(checkpoint.config, kept=((0, 2, 5, 7), (1, 4, 6), (0, 3, 5), (1, 2, 3), (0, 1, 2)))
    kept = Kept(checkpoint, config)
    for layer in (0, 1):
        name = f"layers.{layer}.router_table"
        found = cut_router(config, name, checkpoint.trunk(name))
        np.testing.assert_array_equal(found, kept.trunk(name))
        assert found.dtype == np.float32 and (found == -1).any() and found.max() == len(config.kept[layer]) - 1


def test_the_heaviest_experts_of_a_token_stay_when_top_k_is_smaller(golden):
    """And their weights sum to the router's scale, whichever are in the table."""
    checkpoint = Checkpoint(golden[NAME][0])
    config = replace(checkpoint.config, layer_top_k=(2, 3, 3, 3, 3))
    h, ids = np.random.default_rng(2).standard_normal((9, config.dim)).astype(np.float32), np.arange(20, 29)
    whole, _ = reference.route(checkpoint.config, checkpoint, 0, h, ids=ids)
    chosen, weights = reference.route(config, checkpoint, 0, h, ids=ids)
    np.testing.assert_array_equal(chosen, whole[:, :2])
    assert (np.diff(weights) <= 0).all()
    np.testing.assert_allclose(weights.sum(-1), config.routing_scale, rtol=1e-5)
    assert (np.sort(whole, axis=-1) == np.sort(checkpoint.trunk("layers.0.router_table")[ids], axis=-1)).all()
    with pytest.raises(ValueError, match="layer 0 looks experts up by token ids, which are not given"):
        reference.route(config, checkpoint, 0, h)


def test_attention_has_the_matrices_of_its_kind(golden):
    config = Checkpoint(golden[NAME][0]).config
    window, sparse, heavy = (config.layers[at].attention for at in range(3))
    assert all(isinstance(its, CompressedAttention) for its in (window, sparse, heavy))
    names = [set(its.shapes(64)) for its in (window, sparse, heavy)]
    assert names[2] - names[0] == {"pool.kv", "pool.gate", "pool.bias", "pool.norm"}
    assert names[1] - names[2] == {f"index.{part}" for part in ("q", "kv", "gate", "bias", "k_norm", "weights")}
    assert sparse.shapes(64)["pool.kv"] == (2 * 24, 64) and heavy.shapes(64)["pool.kv"] == (24, 64)
