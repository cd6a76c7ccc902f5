"""Every family from end to end: compressed for text, paged, several requests at once, pruned and scored.

The logits of transformers are the measure; those of lossless bundles are in test_engine.py, GPUs in
test_cuda_engine.py.
"""

import json

import pytest
from bundles import (
    assert_logits_of_transformers,
    make_engine,
    mask_routers_of,
    prunable,
    run_engine,
    run_together,
    same_bits,
)
from golden_checkpoints import FAMILIES
from make_golden import COMMON, LATENT
from test_sequences import alone, requests

from edge_moe.bench.evaluate import evaluate
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config_file import ARCHITECTURES, load_config, parse_config
from edge_moe.runtime.runtime import Runtime
from edge_moe.runtime.score import LOGITS_ROWS

EXPERTS = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
MAMBA = {"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "moe_shared_expert_intermediate_size": 32}
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG_ROPE |= {"short_mscale": 1.0, "long_mscale": 1.0, "original_max_position_embeddings": 64}


def test_every_family_has_golden_logits():
    five = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3"}
    assert five | set(FAMILIES) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_compressed_model_predicts_what_transformers_does(mixed, golden, name):
    _, ids, want = golden[name]
    with Runtime(mixed(name), context=64, logits_rows=LOGITS_ROWS) as runtime:
        result = evaluate(runtime, ids, context=32, against=lambda window: want[: len(window)])
        assert result["tokens"] == 31
        # 0.01 to 0.08 with a trunk of 6 bits, of random weights; 0.10 of sparsemixer's, which jump where an expert
        # comes near; 0.13 to 0.2 of delta nets, whose states add up what is rounded; more where an indexer chooses
        # among positions, of which random ones score alike
        config = runtime.config
        sensitive = config.router.score == "sparsemixer" or config.recurrent_layers or config.chooses_positions
        assert result["kld_mean"] < (0.3 if sensitive else 0.1)


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_checkpoint_gives_the_logits_of_transformers(tmp_path, name, hub):
    """As the hub has it, and as transformers has it in memory, with a layer's experts in two tensors."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import random_model

    random_model(name, seed=19).save_pretrained(tmp_path, save_original_format=hub)
    assert_logits_of_transformers(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_chunks_threads_and_neighbours_change_no_bit(mixed, golden, name):
    path, ids, logits = mixed(name), golden[name][1], golden[name][2]
    want, top_k = run_engine(make_engine(path), ids), Bundle.open(path).config.top_k
    for slots, chunk, threads in ((None, 7, 2), (top_k, 1, 1), (top_k + 1, 16, 2)):
        assert same_bits(run_engine(make_engine(path, slots=slots, threads=threads), ids, chunk), want)
    asked = requests(logits.shape[1], 6)
    engine = make_engine(path, sequences=3, slots=top_k, chunk=64)
    for request, got in zip(asked, run_together(engine, asked, 3), strict=True):
        assert same_bits(got, alone(path, request))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_answer_uses_fewer_experts_and_says_so(golden, tmp_path, name):
    source, ids, _ = golden[name]
    path = prunable(tmp_path / "b.emoe", source, mask_routers_of(Checkpoint(source).config))
    with Runtime(path, context=64) as runtime:
        whole, pruned = (runtime.generate(ids[:8].tolist(), 8, prune=how) for how in ("off", 0.2))
    assert pruned.experts_used < whole.experts_used == Bundle.open(path).config.top_k
    assert pruned.dropped_routing_weight > 0 == whole.dropped_routing_weight


def test_what_is_new_about_an_unknown_family_is_said():
    raw = {"model_type": "qwen9", "num_experts": 8, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4}
    with pytest.raises(ValueError) as error:
        parse_config(raw)
    assert str(error.value) == (
        f"config.json: architecture 'qwen9' is not supported; supported are {', '.join(ARCHITECTURES)}; "
        "new about this one: linear attention"
    )
    with pytest.raises(ValueError, match="new about this one: Mamba layers, short convolutions"):
        parse_config({"model_type": "x", "text_config": {"num_experts": 2, "mamba_d_conv": 4, "conv_bias": True}})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "kimi_k25"}, "text_config is None, expected an object"),
        (
            {"model_type": "mistral3", "text_config": {"model_type": "mistral"}},
            "a language model 'mistral' in mistral3 is not supported; supported is mistral4",
        ),
        ({"model_type": "deepseek_v2", "topk_method": "best"}, "topk_method 'best' is not supported"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias true is not supported for ernie4_5_moe"),
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [1, 2]}, r"moe_topk is \[1, 2\]; the same in every layer"),
        ({"model_type": ["x"]}, r"architecture \['x'\] is not supported"),
        (
            {"model_type": "granitemoe", "num_local_experts": 8, "logits_scaling": 0},
            "logits_scaling is 0, expected a number above 0",
        ),
        (
            {"model_type": "mistral4", "rope_parameters": {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0, expected a whole number from 1",
        ),
        (
            {"model_type": "glm4_moe_lite", "mlp_layer_types": [["dense"], "sparse"]},
            "mlp_layer_types is .*, expected dense or sparse for every layer",
        ),
        (
            {"model_type": "glm4_moe_lite", "first_k_dense_replace": "1"},
            "first_k_dense_replace is '1', expected a whole number from 0",
        ),
        ({"model_type": "hunyuan_v1_moe", "use_cla": True}, "use_cla is not supported for hunyuan_v1_moe"),
        (
            {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense"], "num_hidden_layers": 2},
            "mlp_layer_types is .'dense'., expected dense or sparse for every layer",
        ),
        (
            {
                "model_type": "qwen3_next",
                "shared_expert_intermediate_size": 32,
                "layer_types": ["linear_attention", "mamba"],
            },
            r"layer_types is \['linear_attention', 'mamba'\], expected linear_attention or full_attention for every",
        ),
        (
            {"model_type": "qwen3_next", "shared_expert_intermediate_size": 32, "linear_num_value_heads": 5},
            "linear_num_value_heads must be a multiple of linear_num_key_heads",
        ),
        ({"model_type": "qwen3_5_moe"}, "text_config is None, expected an object"),
        *(
            (
                {"model_type": "gemma4_text", "enable_moe_block": True, "hidden_size_per_layer_input": 0, **change},
                message,
            )
            for change, message in [
                ({"enable_moe_block": False}, "enable_moe_block is false; this is a dense model, and edge-moe runs"),
                (
                    {"hidden_size_per_layer_input": 256},
                    "hidden_size_per_layer_input is 256, inputs of each layer are not",
                ),
                (
                    {"hidden_size_per_layer_input": None},
                    "hidden_size_per_layer_input is 256, inputs of each layer are not",
                ),
                ({"num_kv_shared_layers": 20}, "num_kv_shared_layers is 20, layers that share keys and values are not"),
                (
                    {"use_bidirectional_attention": "all"},
                    "use_bidirectional_attention is 'all', expected null or 'vision'",
                ),
                (
                    {**EXPERTS, "layer_types": ["full_attention"]},
                    "layer_types is .'full_attention'., expected sliding_att",
                ),
                (
                    {**EXPERTS, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
                    "rope_parameters has no sliding_attention with a rope_theta",
                ),
                (
                    {**EXPERTS, "rope_parameters": {"sliding_attention": {"rope_type": "yarn", "rope_theta": 1e6}}},
                    "rope type 'yarn' is not supported; supported are default, linear, proportional",
                ),
                (
                    {**EXPERTS, "per_layer_config": {"30": {}}},
                    "per_layer_config has '30'; supported are head_dim and num_key",
                ),
                (
                    {**EXPERTS, "per_layer_config": {"01": {"sliding_window": 4}}},
                    "per_layer_config has 'sliding_window'; supported are head_dim and num_key_value_heads of layers",
                ),
                (
                    {**EXPERTS, "per_layer_config": {"05": 4}},
                    "per_layer_config is {'05': 4}, expected an object for each",
                ),
                ({**EXPERTS, "final_logit_softcapping": 0}, "final_logit_softcapping is 0, expected a number above 0"),
                (
                    {**EXPERTS, "num_global_key_value_heads": 3, "attention_k_eq_v": True},
                    "num_attention_heads must be a mul",
                ),
            ]
        ),
        (
            {"model_type": "lfm2_moe", "conv_bias": True},
            "conv_bias true is not supported for lfm2_moe; supported is false",
        ),
        (
            {"model_type": "lfm2_moe", "layer_types": ["conv", "linear_attention"]},
            r"layer_types is \['conv', 'linear_attention'\], expected conv or full_attention for every layer",
        ),
        ({"model_type": "lfm2_moe"}, "layer_types is None, expected conv or full_attention for every layer"),
        (
            {"model_type": "lfm2_moe", "layer_types": ["conv"] * 2, "num_dense_layers": -1},
            "num_dense_layers is -1, expected a whole number from 0",
        ),
        (
            {"model_type": "lfm2_moe", "layer_types": ["conv"] * 2, "num_dense_layers": 2},
            "config.json: no layer has experts",
        ),
        (
            {"model_type": "lfm2_moe", "tie_word_embeddings": True, "tie_embedding": False},
            "tie_word_embeddings is True and tie_embedding is False, two spellings of one key",
        ),
        *(
            ({"model_type": "nemotron_h", **change}, message)
            for change, message in [
                ({"moe_latent_size": 16}, "moe_latent_size 16 is not supported for nemotron_h; supported is None"),
                (
                    {"mlp_hidden_act": "silu"},
                    "mlp_hidden_act 'silu' is not supported for nemotron_h; supported is 'rel",
                ),
                ({"use_bias": True}, "use_bias True is not supported for nemotron_h; supported is False"),
                ({}, "key 'layers_block_type' or 'hybrid_override_pattern' is missing"),
                (
                    {"hybrid_override_pattern": "MX"},
                    r"hybrid_override_pattern is 'MX', expected a letter of M\*E- for ev",
                ),
                (
                    {"layers_block_type": ["mamba", "conv"]},
                    r"layers_block_type is \['linear_attention', 'conv'\], expected linear_attention or full_attention",
                ),
                ({"hybrid_override_pattern": "MEM"}, "layers_block_type is .*, expected .* for every layer"),
                ({"hybrid_override_pattern": "M-", "mamba_num_heads": 2, **MAMBA}, "no layer has experts"),
                (
                    {"hybrid_override_pattern": "ME", "mamba_num_heads": 3, **MAMBA},
                    "mamba_num_heads must be a multiple of n_groups",
                ),
            ]
        ),
        ({"model_type": "phimoe", "num_experts_per_tok": 1}, "num_experts_per_tok is 1, expected 2"),
        (
            {"model_type": "phimoe", "router_jitter_noise": "0.01"},
            "router_jitter_noise is '0.01', expected a number from 0 to",
        ),
        ({"model_type": "phimoe", "lm_head_bias": 1}, "lm_head_bias is 1, expected true or false"),
        (
            {"model_type": "phimoe", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope type 'linear' is not supported; supported are default, longrope",
        ),
        *(
            ({"model_type": "phimoe", "rope_scaling": {**LONG_ROPE, **change}}, message)
            for change, message in [
                (
                    {"short_factor": [1.0] * 7},
                    "short_factor is 7 values, expected a list of 8 numbers, one for each pair",
                ),
                ({"long_factor": 2.0}, "long_factor is 2.0, expected a list of 8 numbers, one for each pair"),
                ({"long_factor": None}, "key 'long_factor' is missing"),
                ({"long_factor": [2.0] * 7 + [0]}, r"long_factor has 0, expected numbers above 0 to 1e\+30"),
                ({"short_factor": [True] * 8}, r"short_factor has True, expected numbers above 0 to 1e\+30"),
                ({"short_mscale": None}, "key 'short_mscale' is missing"),
                ({"long_mscale": 0}, "long_mscale is 0, expected a number above 0"),
                (
                    {"original_max_position_embeddings": 64.5},
                    "original_max_position_embeddings is 64.5, expected a whole",
                ),
            ]
        ),
    ],
)
def test_what_a_family_does_not_have_is_refused(tmp_path, raw, message):
    with pytest.raises(ValueError, match=message):
        parse_config({**SIZES, **raw})
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **raw}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


SIZES = {
    **COMMON,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts": 8,
    "moe_k": 2,
    **LATENT,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "q_lora_rank": None,
}
