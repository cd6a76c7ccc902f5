"""ModelConfig from config.json: both spellings, every architecture, every refusal."""

import json
from dataclasses import replace

import pytest

from edge_moe.runtime.config import Layer, ModelConfig, trunk_shapes
from edge_moe.runtime.config_file import ARCHITECTURES, load_config, parse_config
from edge_moe.runtime.layers.attention import Attention
from edge_moe.runtime.layers.latent import LatentAttention
from edge_moe.runtime.layers.mlp import Dense, Experts, RouterConfig
from edge_moe.runtime.layers.rope import LongRope, Rope, Stretch, YarnScaling

SHAPES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}
KINDS = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 96, "rms_norm_eps": 1e-5, "sliding_window": 16},
    "olmoe": {"num_experts": 8, "intermediate_size": 96, "rms_norm_eps": 1e-5, "clip_qkv": 1.5},
    "qwen2_moe": {
        "num_experts": 8,
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 160,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 8,
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "head_dim": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "intermediate_size": 192,
        "moe_intermediate_size": 96,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
}

OTHER = {"intermediate_size": 96}


def hub(kind: str, **changes) -> dict:
    """config.json as the hub has it."""
    raw = {"model_type": kind, **SHAPES, **KINDS.get(kind, OTHER), "rope_theta": 5000.0, "torch_dtype": "bfloat16"}
    return {**raw, **changes}


def transformers_5(kind: str) -> dict:
    """The same model as transformers 5 writes it: nulls spelled out, rope in one object."""
    raw = {**hub(kind), "dtype": "bfloat16", "transformers_version": "5.0.0", "use_sliding_window": False}
    del raw["rope_theta"], raw["torch_dtype"]
    raw["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}
    if kind == "qwen3_moe":
        raw["num_local_experts"] = raw.pop("num_experts")
    if kind in ("mixtral", "olmoe"):
        raw["head_dim"] = None
    if kind == "qwen2_moe":
        raw |= {"sliding_window": 0, "layer_types": ["full_attention"] * 3, "qkv_bias": True}
    if kind == "deepseek_v3":
        raw |= {"head_dim": 8, "qk_head_dim": 24, "rope_interleave": True}
        del raw["topk_method"], raw["scoring_func"]
    return raw


def expected(architecture: str, attention, experts: Experts, dense=(), **values) -> ModelConfig:
    layers = tuple(Layer(attention, Dense(192) if layer in dense else experts) for layer in range(3))
    return ModelConfig(architecture, 64, 128, 256, layers, eos_tokens=(7,), **values)


ROPE = Rope(16, 5000.0)
EXPECTED = {
    "mixtral": expected(
        "mixtral",
        Attention(4, 2, 16, ROPE, window=16),
        Experts(8, 2, 96, RouterConfig(renormalise=True)),
        norm_eps=1e-5,
    ),
    "olmoe": expected("olmoe", Attention(4, 2, 16, ROPE, qk_norm="full", clip=1.5), Experts(8, 2, 96), norm_eps=1e-5),
    "qwen2_moe": expected(
        "qwen2_moe", Attention(4, 2, 16, ROPE, bias=True), Experts(8, 2, 96, shared_hidden=160), dense=(1,)
    ),
    "qwen3_moe": expected(
        "qwen3_moe",
        Attention(4, 2, 32, Rope(32, 5000.0), qk_norm="head"),
        Experts(8, 2, 96, RouterConfig(renormalise=True)),
    ),
    "deepseek_v3": expected(
        "deepseek_v3",
        LatentAttention(4, q_rank=48, kv_rank=40, nope_dim=16, value_dim=24, rope=Rope(8, 5000.0, interleaved=True)),
        Experts(
            8,
            2,
            96,
            RouterConfig("sigmoid", True, True, groups=4, top_groups=2, group_score="top2sum", scale=2.5),
            shared_hidden=192,
            shared_gate=False,
        ),
        dense=(0,),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_spelling_and_the_transformers_5_spelling_give_the_same_model(kind):
    assert parse_config(hub(kind)) == EXPECTED[kind]
    assert parse_config(transformers_5(kind)) == EXPECTED[kind]


@pytest.mark.parametrize("kind, theta", [("mixtral", 1e6), ("olmoe", 1e4), ("qwen2_moe", 1e4)])
def test_a_rope_theta_left_out_is_the_architectures_own(kind, theta):
    assert parse_config(hub(kind, rope_theta=None)).attention.rope.theta == theta


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    ],
)
def test_linear_rope_scaling_is_read_in_each_spelling(rope):
    config = parse_config(hub("qwen3_moe", **rope))
    assert config.attention.rope == Rope(32, 5000.0, factor=2.0)


def test_a_sparse_step_makes_the_layers_in_between_dense():
    config = parse_config(hub("qwen3_moe", decoder_sparse_step=2))
    assert (config.dense_layers, config.moe_layers, config.dense_hidden) == ((0, 2), (1,), (192, 0, 192))


def test_deepseek_has_experts_in_every_so_many_layers_after_the_first():
    config = parse_config(hub("deepseek_v3", num_hidden_layers=7, moe_layer_freq=2))
    assert config.moe_layers == (2, 4, 6)


def test_yarn_is_read_in_each_spelling():
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.5, "mscale_all_dim": 0.25}
    expected = YarnScaling(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=0.5, mscale_all_dim=0.25)
    for rope in (
        {"rope_scaling": {"type": "yarn", **yarn}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, "beta_fast": 32, "beta_slow": 1, **yarn}},
    ):
        config = parse_config(hub("deepseek_v3", **rope))
        rope = config.attention.rope
        assert (rope.theta, rope.factor, rope.yarn) == (5000.0, 1.0, expected)


def test_yarn_without_magnitudes_has_none():
    rope = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "attention_factor": None}
    yarn = parse_config(hub("deepseek_v3", rope_scaling={**rope, "truncate": True})).attention.rope.yarn
    assert yarn == YarnScaling(2.0, 64, beta_fast=32.0, beta_slow=1.0, mscale=0.0, mscale_all_dim=0.0)


def test_position_turns_neighbours_unless_the_config_says_else():
    assert parse_config(hub("deepseek_v3")).attention.rope.interleaved
    assert not parse_config(hub("deepseek_v3", rope_interleave=False)).attention.rope.interleaved
    assert [parse_config(hub(kind)).attention.rope.dim for kind in ("olmoe", "qwen3_moe", "deepseek_v3")] == [16, 32, 8]


def test_latent_attention_has_its_own_matrices_and_a_shared_expert_may_lack_a_gate():
    shapes = trunk_shapes(EXPECTED["deepseek_v3"])
    layer = {name.removeprefix("layers.1."): shape for name, shape in shapes.items() if name.startswith("layers.1.")}
    assert layer == {
        "attention_norm": (64,),
        "q_a": (48, 64),
        "q_a_norm": (48,),
        "q_b": (4 * 24, 48),
        "kv_a": (48, 64),
        "kv_a_norm": (40,),
        "kv_b": (4 * 40, 40),
        "o": (64, 4 * 24),
        "mlp_norm": (64,),
        "router": (8, 64),
        "router_bias": (8,),
        "shared.gate": (192, 64),
        "shared.up": (192, 64),
        "shared.down": (64, 192),
    }
    plain = parse_config(hub("deepseek_v3", q_lora_rank=None, n_shared_experts=None))
    assert trunk_shapes(plain)["layers.1.q"] == (4 * 24, 64)
    assert not [name for name in trunk_shapes(plain) if "q_" in name or "shared" in name]


def test_an_old_rope_object_beside_the_new_one_adds_its_scaling():
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rope_scaling": {"type": "linear"}}
    rope["rope_scaling"]["factor"] = 4.0
    config = parse_config(hub("qwen3_moe", **rope))
    assert config.attention.rope == Rope(32, 5000.0, factor=4.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "longrope"}, "rope_theta": 5000.0, "original_max_position_embeddings": 64},
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 5000.0, "original_max_position_embeddings": 64}},
    ],
)
def test_phimoe_is_read_in_each_spelling(rope):
    lists = {"short_factor": [1] * 8, "long_factor": [2.5] * 8, "short_mscale": 1.25, "long_mscale": 1.5}
    rope = {key: {**its, **lists} if isinstance(its, dict) else its for key, its in rope.items()}
    own = {"intermediate_size": 96, "num_local_experts": 8, "attention_bias": True, "lm_head_bias": True}
    own |= {"router_jitter_noise": 0.25, "input_jitter_noise": 0.01, "sliding_window": 256, "rms_norm_eps": 1e-5}
    config = parse_config({"model_type": "phimoe", **SHAPES, **own, **rope})
    long = LongRope(64, Stretch((1.0,) * 8, 1.25), Stretch((2.5,) * 8, 1.5))
    assert config == expected(
        "phimoe",
        Attention(4, 2, 16, Rope(16, 5000.0, long=long), bias=True, output_bias=True, window=256),
        Experts(8, 2, 96, RouterConfig("sparsemixer", threshold=0.5)),
        norm="layer",
        norm_eps=1e-5,
        head_bias=True,
    )
    shapes = trunk_shapes(config)
    assert list(shapes)[1:3] == ["layers.0.attention_norm", "layers.0.attention_norm_bias"]
    biases = {name: shapes[name] for name in ("layers.2.mlp_norm_bias", "output_norm_bias", "head_bias")}
    assert biases == {"layers.2.mlp_norm_bias": (64,), "output_norm_bias": (64,), "head_bias": (128,)}


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_gpt_oss_is_read_in_each_spelling(name, truncate):
    rope = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": truncate}
    rope |= {"original_max_position_embeddings": 64}
    beside = {"rope_theta": 5000.0, name: rope} if name == "rope_scaling" else {name: {**rope, "rope_theta": 5000.0}}
    own = {"intermediate_size": 96, "num_local_experts": 8, "head_dim": 16, "sliding_window": 24, "swiglu_limit": 5.0}
    own |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "rms_norm_eps": 1e-5}
    config = parse_config({"model_type": "gpt_oss", **SHAPES, **own, **beside})
    yarn = YarnScaling(32.0, 64, beta_fast=32.0, beta_slow=1.0, mscale=0.0, mscale_all_dim=0.0, truncate=truncate)
    full = Attention(4, 2, 16, Rope(16, 5000.0, yarn=yarn), bias=True, output_bias=True, sinks=True)
    router = RouterConfig(renormalise=True, logit_bias=True)
    want = expected(
        "gpt_oss",
        full,
        Experts(8, 2, 96, router, output_bias=True),
        activation="clamped_swiglu",
        swiglu_alpha=1.702,
        swiglu_limit=5.0,
        norm_eps=1e-5,
    )
    layers = (replace(want.layers[0], attention=replace(full, window=24)), *want.layers[1:])
    assert config == replace(want, layers=layers)
    shapes = trunk_shapes(config)
    assert shapes["layers.2.sinks"] == (4,) and shapes["layers.0.router_logit_bias"] == (8,)
    assert "layers.0.router_bias" not in shapes


def test_a_dense_model_is_called_so():
    raw = {key: value for key, value in hub("qwen3_moe", model_type="qwen3").items() if "experts" not in key}
    with pytest.raises(ValueError) as error:
        parse_config(raw)
    assert str(error.value) == (
        f"config.json: architecture 'qwen3' is not supported; {SUPPORTED}; "
        "this is a dense model, and edge-moe runs mixtures of experts"
    )


def test_mixtral_has_no_attention_bias_whatever_its_config_says():
    assert parse_config(hub("mixtral", attention_bias=True)).attention.bias is False


def test_an_expert_has_three_matrices():
    assert EXPECTED["olmoe"].expert_weights == 3 * 64 * 96


def test_end_tokens_of_both_configs_count(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hub("olmoe", eos_token_id=[5, 9])))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert load_config(tmp_path).eos_tokens == (3, 5, 9)


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
SUPPORTED = f"supported are {', '.join(ARCHITECTURES)}"
REFUSED = [
    ("olmoe", {"model_type": "llama"}, f"architecture 'llama' is not supported; {SUPPORTED}"),
    ("olmoe", {"model_type": None}, f"architecture None is not supported; {SUPPORTED}"),
    ("olmoe", {"num_experts": None}, "key 'num_experts' or 'num_local_experts' is missing"),
    ("olmoe", {"hidden_size": None}, "key 'hidden_size' is missing"),
    ("olmoe", {"hidden_size": 0}, "hidden_size is 0, expected a whole number from 1 to 2,147,483,647"),
    ("olmoe", {"hidden_size": True}, "hidden_size is True, expected a whole number from 1 to 2,147,483,647"),
    ("olmoe", {"hidden_size": "64"}, "hidden_size is '64', expected a whole number from 1 to 2,147,483,647"),
    ("olmoe", {"num_experts": 10**9}, "num_experts is 1000000000, expected a whole number from 1 to 4,096"),
    (
        "qwen3_moe",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers is 1000000000, expected a whole number from 1 to 1,024",
    ),
    ("olmoe", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, expected a number from 0 to 1e+30"),
    ("olmoe", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number from 0 to 1e+30"),
    ("olmoe", {"rms_norm_eps": 10**40}, f"rms_norm_eps is {10**40}, expected a number from 0 to 1e+30"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
    ("olmoe", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported are "
     "silu, swish, gelu_pytorch_tanh, gelu_new"),
    ("olmoe", {"hidden_act": ["silu"]}, "hidden_act ['silu'] is not supported; supported are "
     "silu, swish, gelu_pytorch_tanh, gelu_new"),
    ("olmoe", {"rope_scaling": 4}, "rope_scaling is 4, expected an object"),
    ("olmoe", {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
     "rope_parameters has an object for 'full_attention'; one for all layers is supported"),
    ("olmoe", {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is 5000.0 and rope_parameters.rope_theta is "
     "1000000.0, two spellings of one key; remove the one that is wrong"),
    ("olmoe", {"rope_scaling": {"type": "linear", "rope_type": "default"}}, "rope_scaling.rope_type is 'default' and "
     "rope_scaling.type is 'linear', two spellings of one key; remove the one that is wrong"),
    ("olmoe", {"rope_parameters": {"type": "linear", "factor": 2}, "rope_scaling": {"type": "linear", "factor": 4}},
     "rope_parameters.factor is 2 and rope_scaling.factor is 4, two spellings of one key; "
     "remove the one that is wrong"),
    ("olmoe", {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 4},
               "rope_theta": None}, "rope_scaling replaces rope_parameters, but rope_theta 500000.0 is in "
     "rope_parameters alone; write all of it into rope_parameters"),
    ("olmoe", {"partial_rotary_factor": 0.5},
     "partial_rotary_factor other than 1 is not supported for olmoe, found 0.5"),
    ("olmoe", {"num_local_experts": 16}, "num_experts is 8 and num_local_experts is 16, two spellings of one key; "
     "remove the one that is wrong"),
    ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is "
     "['full_attention', 'sliding_attention', 'full_attention'], expected full_attention in every layer"),
    ("olmoe", {"rope_scaling": {"type": "dynamic", "alpha": 2.0}}, "rope type 'dynamic' is not supported; "
     "supported are default, linear, yarn"),
    ("olmoe", {"rope_scaling": {"type": "linear"}}, "key 'factor' is missing"),
    ("olmoe", {"rope_parameters": {"partial_rotary_factor": 0.5}},
     "partial_rotary_factor other than 1 is not supported for olmoe, found 0.5"),
    ("olmoe", {"rope_theta": 0}, "rope_theta and factor must be above 0, found 0.0 and 1.0"),
    ("qwen2_moe", {"mlp_only_layers": "1"}, "mlp_only_layers is '1', expected a list of layer numbers"),
    ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
    ("qwen3_moe", {"use_sliding_window": True},
     "use_sliding_window is not supported for qwen3_moe; set it to false"),
    ("qwen3_moe", {"attention_bias": True},
     "attention_bias true is not supported for qwen3_moe (it biases the output projection too)"),
    ("olmoe", {"attention_bias": True},
     "attention_bias true is not supported for olmoe (it biases the output projection too)"),
    ("olmoe", {"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
    ("qwen3_moe", {"head_dim": 15}, "head_dim must be even"),
    ("olmoe", {"num_experts_per_tok": 9}, "num_experts_per_tok is larger than the number of experts"),
    ("deepseek_v3", {"kv_lora_rank": None}, "key 'kv_lora_rank' is missing"),
    ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank is 0, expected a whole number from 1 to 2,147,483,647"),
    ("deepseek_v3", {"n_routed_experts": None}, "key 'n_routed_experts' or 'num_local_experts' is missing"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
    ("deepseek_v3", {"first_k_dense_replace": -1},
     "first_k_dense_replace is -1, expected a whole number from 0"),
    ("deepseek_v3", {"first_k_dense_replace": 3}, "no layer has experts"),
    ("deepseek_v3", {"scoring_func": "softmax"},
     "scoring_func 'softmax' is not supported for deepseek_v3; supported is sigmoid"),
    ("deepseek_v3", {"topk_method": "greedy"},
     "topk_method 'greedy' is not supported for deepseek_v3; supported is noaux_tc"),
    ("deepseek_v3", {"n_group": 3}, "n_routed_experts must be a multiple of n_group"),
    ("deepseek_v3", {"n_group": 8}, "a group must have at least two experts"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group is larger than n_group"),
    ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok is more than topk_group groups have"),
    ("deepseek_v3", {"attention_bias": True},
     "attention_bias true is not supported for deepseek_v3 (it biases the output projection too)"),
    ("deepseek_v3", {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported; "
     "supported are default, linear, yarn"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "original_max_position_embeddings": 64},
                     "original_max_position_embeddings": 32}, "original_max_position_embeddings is 32 and "
     "rope_scaling.original_max_position_embeddings is 64, two spellings of one key; remove the one that is wrong"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "attention_factor": 1.0}},
     "attention_factor of rope type yarn is not supported; leave it out"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "truncate": 0}}, "truncate is 0, expected true or false"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention'], expected sliding_attention "
     "or full_attention for every layer"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "layer_types is ['chunked_attention', 'chunked_attention', "
     "'chunked_attention'], expected sliding_attention or full_attention for every layer"),
    ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit is 0, expected a number above 0"),
    ("gpt_oss", {"swiglu_alpha": "1.7"}, "swiglu_alpha is '1.7', expected a number from 0 to 1e+30"),
    ("gpt_oss", {"attention_bias": 1}, "attention_bias is 1, expected true or false"),
    ("gpt_oss", {"sliding_window": -1}, "sliding_window is -1, expected a whole number from 1 to 2,147,483,647"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "beta_fast": 0}},
     "rope type yarn needs beta_fast and beta_slow above 0 and rope_theta above 1"),
    ("deepseek_v3", {"rope_scaling": {**YARN, "beta_slow": 0}},
     "rope type yarn needs beta_fast and beta_slow above 0 and rope_theta above 1"),
    ("deepseek_v3", {"rope_scaling": YARN, "rope_theta": 1.0},
     "rope type yarn needs beta_fast and beta_slow above 0 and rope_theta above 1"),
    ("deepseek_v3", {"rope_interleave": 1}, "rope_interleave is 1, expected true or false"),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes, message", REFUSED)
def test_a_config_that_is_not_supported_is_refused_by_key(kind, changes, message):
    with pytest.raises(ValueError) as error:
        parse_config(hub(kind, **changes), where="models/x/config.json")
    assert str(error.value) == f"models/x/config.json: {message}"


def test_a_directory_without_config_json_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_config(tmp_path)
    assert str(error.value) == f"{tmp_path}/config.json: no such file; a model directory has a config.json"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"x", "not valid JSON (Expecting value: line 1 column 1 (char 0)); copy the file again"),
        (b"[1]", "expected a JSON object, found list; copy the file again"),
        (
            b'{"a": ["\\uD83D\\ude00", "\\ud83d"]}',
            "has a string with half a surrogate pair, which no text has; copy the file again",
        ),
    ],
)
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_config(tmp_path)
    assert str(error.value) == f"{tmp_path}/config.json: {message}"


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"])
def test_hostile_json_is_refused_with_the_name_of_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: (not valid JSON|architecture|expected)"):
        load_config(tmp_path)
