"""What each architecture of GGUF files is in our families: keys of config.json, names of tensors, how values differ.

llama.cpp's graphs have some choices that the metadata lacks, such as whether routing weights are renormalised: those
are here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...runtime.config import ModelConfig
from ...runtime.layers.delta_net import DeltaNet
from ...runtime.models.family import Shape, conv_read
from .gguf_file import GgufFile
from .gguf_keys import of_deepseek, of_delta_nets, of_gemma4, of_lfm2, of_nemotron
from .names import KEYS_OF_LATENT, VALUES_OF_LATENT

Convert = Callable[[np.ndarray], np.ndarray]
USUAL_KEYS = {  # of config.json, by those of the metadata
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.clamp_kqv": "clip_qkv",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
USUAL_NAMES = {  # canonical names, by GGUF's
    "token_embd": "embedding",
    "output_norm": "output_norm",
    "attn_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
    "post_attention_norm": "mlp_norm",
    **{f"attn_{part}": part for part in "qkv"},
    "attn_output": "o",
    "attn_sinks": "sinks",
    **{f"attn_{part}_norm": f"{part}_norm" for part in "qk"},
    "ffn_gate_inp": "router",
    "ffn_gate_inp.bias": "router_logit_bias",
    "exp_probs_b": "router",
    **{f"ffn_{part}": f"dense.{part}" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"shared.{part}" for part in ("gate", "up", "down")},
    "ffn_gate_inp_shexp": "shared_router",
}


def last_of_one(shape: Shape) -> Shape:
    """The shape with a dimension of 1 after the others, as mlx-lm has it in convolutions."""
    return *shape, 1


def first_of_one(shape: Shape) -> Shape:
    """The shape of a vector as that of a matrix of one row."""
    return 1, math.prod(shape)


def flat(shape: Shape) -> Shape:
    """The shape of a vector with all values."""
    return (math.prod(shape),)


USUAL_SHAPES = {"shared_router": first_of_one}  # by canonical name, where that of the file is another


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `general.architecture`: the model_type, and keys of config.json."""

    model_type: str
    always: dict[str, object]  # unless the metadata says else
    keys: dict[str, str] = field(default_factory=dict)
    rope_scaling: dict[str, object] = field(default_factory=dict)  # what YaRN's parameters always are
    rows_paired: bool = False  # the two rows of each pair that RoPE rotates are next to each other in attn_q and attn_k
    names: dict[str, str] = field(default_factory=dict)  # canonical ones, or the family's of what has several tensors
    shapes: dict[str, Callable[[Shape], Shape]] = field(default_factory=dict)  # where that of the file is another
    more: Callable[[GgufFile], dict[str, object]] = lambda file: {}  # keys that are computed
    conversions: Callable[[ModelConfig], Mapping[str, Convert]] = lambda config: {}  # of values, by canonical name
    rope_factors: bool = False  # has a tensor with divisors of RoPE's angles, which `more` reads


def value_heads_in_turn(config: ModelConfig) -> dict[str, Convert]:
    """Qwen3.5's files have the first value head of each key head, then the second ones, as llama.cpp repeats keys."""
    its = next((its for its in config.attentions if isinstance(its, DeltaNet)), None)
    if its is None:  # a config.json beside the file is another model's, and does not match its tensors
        return {}

    def rows(size: int, before: int = 0) -> np.ndarray:
        """Where the rows are that come next. size: rows of a head; before: rows that are of keys."""
        heads = np.arange(its.heads * size).reshape(its.heads // its.kv_heads, its.kv_heads, size)
        return np.concatenate([np.arange(before), before + heads.swapaxes(0, 1).ravel()])

    of_keys, one, wide = rows(its.value_dim, 2 * its.kv_heads * its.head_dim), rows(1), rows(its.value_dim)
    return {
        "delta.qkv": lambda values: values[of_keys],
        "delta.conv": lambda values: np.ascontiguousarray(conv_read(values)[:, of_keys]),
        "delta.gate": lambda values: values[wide],
        **dict.fromkeys(("delta.write", "delta.decay", "delta.decay_bias"), lambda values: values[one]),
        "delta.decay_rate": lambda values: -values[one],
        "delta.o": lambda values: np.ascontiguousarray(values[:, wide]),
    }


ALL_OF_ONE_SIZE = {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size"}
DELTA_NETS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
OF_DELTA_NETS = {
    "attn_qkv": "delta.qkv",
    "attn_gate": "delta.gate",
    "ssm_in": "linear_attn.in_proj_qkvz.weight",  # older files
    "ssm_ba": "linear_attn.in_proj_ba.weight",
    "ssm_beta": "delta.write",
    "ssm_alpha": "delta.decay",
    "ssm_conv1d": "delta.conv",
    "ssm_dt.bias": "delta.decay_bias",
    "ssm_a": "delta.decay_rate",
    "ssm_norm": "delta.norm",
    "ssm_out": "delta.o",
}
ARCHITECTURES = {
    "qwen3moe": Architecture("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 1}),
    "qwen2moe": Architecture("qwen2_moe", {"norm_topk_prob": False, "decoder_sparse_step": 1, "qkv_bias": True}),
    "olmoe": Architecture("olmoe", {"norm_topk_prob": False}),
    "llama": Architecture("mixtral", {}, {"expert_count": "num_local_experts"}, rows_paired=True),
    "glm4moe": Architecture(
        "glm4_moe",
        {"n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5},
        {
            "expert_count": "n_routed_experts",
            "expert_shared_count": "n_shared_experts",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
        },
    ),
    "minimax-m2": Architecture("minimax_m2", {}, {**ALL_OF_ONE_SIZE, "rope.dimension_count": "rotary_dim"}),
    "gpt-oss": Architecture(
        *("gpt_oss", {}, {**ALL_OF_ONE_SIZE, "attention.sliding_window": "sliding_window"}),
        rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
    "qwen3next": Architecture(
        *("qwen3_next", {"norm_topk_prob": True, "decoder_sparse_step": 1}, DELTA_NETS),
        names=OF_DELTA_NETS,
        shapes={"delta.conv": last_of_one},
        more=of_delta_nets,
        conversions=lambda config: {"delta.decay_rate": np.negative},
    ),
    "qwen35moe": Architecture(
        *("qwen3_5_moe_text", {}, DELTA_NETS),
        names=OF_DELTA_NETS,
        shapes={"delta.conv": last_of_one},
        more=of_delta_nets,
        conversions=value_heads_in_turn,
    ),
    "gemma4": Architecture(
        "gemma4_text",
        {"enable_moe_block": True},
        {
            "attention.sliding_window": "sliding_window",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "expert_used_count": "top_k_experts",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        names={
            "post_attention_norm": "attention_post_norm",
            "pre_ffw_norm_2": "mlp_norm",
            "ffn_gate_inp.scale": "router_norm",
            "ffn_down_exps.scale": "expert_scale",
            "post_ffw_norm_2": "experts_post_norm",
            "ffn_norm": "shared_norm",
            **{f"ffn_{part}": f"shared.{part}" for part in ("gate", "up", "down")},
            "post_ffw_norm_1": "shared_post_norm",
            "post_ffw_norm": "mlp_post_norm",
            "layer_output_scale": "layer_scale",
        },
        more=of_gemma4,
        rope_factors=True,
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        {"conv_bias": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
        {
            "attention.layer_norm_rms_epsilon": "norm_eps",
            "leading_dense_block_count": "num_dense_layers",
            "shortconv.l_cache": "conv_L_cache",
        },
        names={
            "token_embd_norm": "output_norm",
            "shortconv.in_proj": "conv.in_proj.weight",
            "shortconv.conv": "conv.weights",
            "shortconv.out_proj": "conv.o",
        },
        shapes={"conv.weights": last_of_one},
        more=of_lfm2,
    ),
    "nemotron_h_moe": Architecture(
        "nemotron_h",
        {},
        {
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "expert_count": "n_routed_experts",
            "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
            "expert_weights_norm": "norm_topk_prob",
            "expert_weights_scale": "routed_scaling_factor",
            "moe_latent_size": "moe_latent_size",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.group_count": "n_groups",
            "ssm.state_size": "ssm_state_size",
            "ssm.time_step_rank": "mamba_num_heads",
        },
        names={
            "ssm_in": "mixer.in_proj.weight",
            "ssm_conv1d": "mamba.conv",
            "ssm_dt.bias": "mamba.step_bias",
            "ssm_a": "mamba.decay_rate",
            "ssm_d": "mamba.skip",
            "ssm_norm": "mamba.norm",
            "ssm_out": "mamba.o",
        },
        shapes={"mamba.conv": last_of_one, **dict.fromkeys(("mamba.decay_rate", "mamba.skip", "mamba.norm"), flat)},
        more=of_nemotron,
        conversions=lambda config: {"mamba.decay_rate": np.negative},
    ),
    "deepseek2": Architecture(
        "deepseek_v3",
        {"routed_scaling_factor": 1.0, "q_lora_rank": None},
        {
            **{f"attention.{part}_lora_rank": f"{part}_lora_rank" for part in ("q", "kv")},
            "expert_count": "n_routed_experts",
            "expert_shared_count": "n_shared_experts",
            "expert_weights_scale": "routed_scaling_factor",
            "leading_dense_block_count": "first_k_dense_replace",
        },
        names={
            **{f"attn_{part}": part for part in ("q_a", "q_b", "kv_b")},
            **{f"attn_{part}_norm": f"{part}_norm" for part in ("q_a", "kv_a")},
            "attn_kv_a_mqa": "kv_a",
            "attn_k_b": KEYS_OF_LATENT,
            "attn_v_b": VALUES_OF_LATENT,
        },
        more=of_deepseek,
    ),
    "granitemoe": Architecture(
        "granitemoe",
        {},
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "expert_count": "num_local_experts",
            "logit_scale": "logits_scaling",
            "residual_scale": "residual_multiplier",
        },
        rows_paired=True,
    ),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        {},
        {
            "expert_count": "moe_num_experts",
            "expert_shared_count": "moe_num_shared_experts",
            "expert_used_count": "moe_k",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        shapes={"router_bias": first_of_one},
    ),
    "hunyuan-moe": Architecture(
        "hunyuan_v1_moe", {}, {"expert_shared_count": "num_shared_expert", "expert_used_count": "moe_topk"}
    ),
}
