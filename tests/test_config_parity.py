"""What config.json means is what transformers takes it to mean: defaults, both spellings, weights that it names."""

import json

import pytest
from bundles import assert_logits_of_transformers
from make_golden import random_model
from test_checkpoint import read_file, write_file

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.config_file import ARCHITECTURES, parse_config
from edge_moe.runtime.config_keys import COMMON_DEFAULTS
from edge_moe.runtime.models import FAMILIES

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GEMMA4 = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
QWEN4 = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048}
QWEN4 |= {"indexer_compress_ratio": 16}
NO_DEFAULTS = {  # that a model could have
    "deepseek_v2": {"num_experts_per_tok": 6},
    **dict.fromkeys(("gemma4", "gemma4_text"), {**GEMMA4, "hidden_size_per_layer_input": 0}),
    "glm4_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "nemotron_h": {"num_hidden_layers": 4},
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), QWEN4),
}
LINEAR = {"type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 6.0}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], "long_factor": [9.0] * 8}
LONG |= {"short_mscale": 1.3, "long_mscale": 2.0}


def set_config(directory, without=(), **changes) -> None:
    path = directory / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**raw, **changes}))


def default_of(text, key: str):
    """transformers' default of a key, of a configuration made without any."""
    if key == "rope_theta":
        return text.rope_parameters.get(key) or text.rope_theta  # the second beside objects of several kinds of layers
    if key == "global_head_dim":
        return text.per_layer_config["full_attention"].head_dim
    if key in COMMON_DEFAULTS and not hasattr(text, key):
        return COMMON_DEFAULTS[key]  # a key that the family does not have
    text.allow_global_per_layer_attribute_access = True
    return getattr(text, key)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_absent_key_means_what_it_means_to_transformers(kind):
    family = FAMILIES[kind]
    theirs = type(transformers.AutoConfig.for_model(kind))()
    if family.text:  # of a wrapper, what it says of the language model
        inner = {"mistral3": "mistral4"}.get(kind)
        text = type(transformers.AutoConfig.for_model(inner))() if inner else theirs.get_text_config()
    else:
        text = theirs
    for key, value in {**COMMON_DEFAULTS, **family.defaults}.items():
        assert default_of(text, key) == value, key
    defaults = {**text.to_dict(), **NO_DEFAULTS.get(kind, {})}

    def parse(keys: dict):
        return parse_config({"model_type": kind, family.text: keys} if family.text else keys)

    whole = parse(defaults)
    for key in defaults.keys() - {"model_type", *NO_DEFAULTS.get(kind, {})}:
        without = {name: value for name, value in defaults.items() if name != key}
        try:
            assert parse(without) == whole, key
        except ValueError as error:
            assert f"{key!r}" in str(error) and str(error).endswith("is missing")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mixtral", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3_moe", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("olmoe", {"rope_scaling": LINEAR, "rope_parameters": {}, "rope_theta": 500.0}),
        ("qwen2_moe", {"rope_scaling": None, "rope_parameters": None, "rope_theta": 500.0}),
        ("deepseek_v3", {"rope_parameters": {**LINEAR, "mscale_all_dim": 1.5, "rope_theta": 1e4}}),
        ("deepseek_v3", {"rope_parameters": {"type": "default", "factor": 4.0, "mscale_all_dim": 1.5}}),
        ("deepseek_v3", {"rope_parameters": {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.5}}),
        ("phimoe", {"rope_scaling": LONG, "rope_theta": 500.0, "original_max_position_embeddings": 64}),
        ("phimoe", {"rope_parameters": LONG}),  # the original context is the model's
        ("phimoe", {}),
        ("gpt_oss", {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 500.0}),
        ("gpt_oss", {"rope_parameters": {**YARN, "truncate": True}}),
        ("gpt_oss", {"rope_parameters": YARN, "rope_theta": 500.0}),
        ("gpt_oss", {"rope_theta": 500.0}),
        ("gpt_oss", {"rope_parameters": {}}),
        ("gpt_oss", {}),
        ("qwen3_moe", {"rope_parameters": {**LINEAR, "mscale_all_dim": 1.5, "rope_theta": 1e4}}),
    ],
)
def test_rotary_position_in_every_spelling_is_that_of_transformers(tmp_path, kind, changes):
    random_model(kind, seed=23).save_pretrained(tmp_path)
    set_config(tmp_path, without=("rope_parameters",), **changes)
    assert_logits_of_transformers(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deepseek_v3", {"n_shared_experts": 1, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
                         "num_hidden_layers": 4}),
        ("gpt_oss", {"layer_types": None, "swiglu_limit": 7.0, "sliding_window": 128, "num_local_experts": 128,
                     "num_experts_per_tok": 4, "head_dim": 64, "rms_norm_eps": 1e-5}),
        ("gemma4_text", {"layer_types": None, "num_hidden_layers": 7, "num_kv_shared_layers": 0}),
        ("gemma4_text", {"attention_k_eq_v": False, "attention_bias": False, "rope_parameters": None}),
        ("mixtral", {"num_attention_heads": 8, "num_key_value_heads": 8}),
        ("phimoe", {"router_jitter_noise": 0.01, "num_local_experts": 16, "rms_norm_eps": 1e-5}),
        ("qwen2_moe", {"num_attention_heads": 16, "num_key_value_heads": 16, "mlp_only_layers": []}),
    ],
)  # fmt: skip
def test_weights_of_keys_that_are_left_out_are_used(tmp_path, kind, changes):
    random_model(kind, seed=29, **changes).save_pretrained(tmp_path)
    set_config(tmp_path, without=changes.keys() - {"num_hidden_layers", "num_attention_heads"})
    assert_logits_of_transformers(tmp_path)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe"])
def test_a_head_that_is_stored_beside_a_tied_embedding_is_used_where_it_differs(tmp_path, kind, own):
    random_model(kind, seed=31, tie_word_embeddings=not own).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if not own:
        tensors = read_file(path)
        write_file(path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    set_config(tmp_path, tie_word_embeddings=True)
    assert_logits_of_transformers(tmp_path)
    assert Checkpoint(tmp_path).config.tied_head is not own
    assert json.loads((tmp_path / "lossless.emoe" / "config.json").read_text())["tie_word_embeddings"] is not own


@pytest.mark.parametrize(
    "changes",
    [
        {"global_head_dim": 48, "num_global_key_value_heads": None},
        {"attention_k_eq_v": False},  # then there are as many KV heads everywhere
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "tie_word_embeddings": True},
        {"use_bidirectional_attention": "vision", "final_logit_softcapping": None, "num_key_value_heads": 2},
    ],
)
def test_gemma4_as_the_hub_spells_it(tmp_path, changes):
    """transformers 5.24 writes per_layer_config instead of the two keys of global layers."""
    hub = {"global_head_dim": 36, "num_global_key_value_heads": 2, **changes}
    random_model("gemma4_text", seed=41, **hub).save_pretrained(tmp_path)
    set_config(tmp_path, without=["per_layer_config"], **hub)
    assert_logits_of_transformers(tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_names_without_the_models_prefix_are_read(tmp_path, kind):
    random_model(kind, seed=37, tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    write_file(path, {name.removeprefix("model."): tensor for name, tensor in read_file(path).items()})
    assert_logits_of_transformers(tmp_path)
