"""What each architecture of GGUF files is in our families: keys of config.json, names of tensors, how values differ.

llama.cpp's graphs have some choices that the metadata lacks, such as whether routing weights are renormalised: those
are here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...runtime.config import ModelConfig
from ...runtime.layers.delta_net import DeltaNet
from ...runtime.models.family import conv_read
from .gguf_file import GgufFile

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


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `general.architecture`: the model_type, keys of config.json that are always the same, and further ones."""

    model_type: str
    always: dict[str, object]
    keys: dict[str, str] = field(default_factory=dict)
    rope_scaling: dict[str, object] = field(default_factory=dict)  # what YaRN's parameters always are
    rows_paired: bool = False  # the two rows of each pair that RoPE rotates are next to each other in attn_q and attn_k
    names: dict[str, str] = field(default_factory=dict)  # canonical ones, or the family's of what has several tensors
    more: Callable[[GgufFile], dict[str, object]] = lambda file: {}  # keys that are computed
    conversions: Callable[[ModelConfig], Mapping[str, Convert]] = lambda config: {}  # of values, by canonical name
    rope_factors: bool = False  # has a tensor with divisors of RoPE's angles, which `more` reads


def layer_kinds(file: GgufFile, kinds: Mapping[str, str]) -> list[str]:
    """The kind of each layer. kinds: by the name of a tensor that only layers of that kind have."""
    found = []
    for layer in range(file.layers):
        kind = next((kind for part, kind in kinds.items() if f"blk.{layer}.{part}.weight" in file.tensors), None)
        if kind is None:
            raise ValueError(
                f"{file.path}: layer {layer} has none of the tensors {', '.join(kinds)}; download it again"
            )
        found.append(kind)
    return found


def quotient(file: GgufFile, key: str, by: str) -> int | float | None:
    """One number of the metadata over another, whole if it can be; None if one is missing."""
    above, below = file.value(key), file.value(by)
    if not above or not below:
        return None
    return above // below if above % below == 0 else above / below


def of_delta_nets(file: GgufFile) -> dict[str, object]:
    """Keys of Qwen3-Next and Qwen3.5."""
    return {
        "layer_types": layer_kinds(file, {"attn_q": "full_attention", "ssm_out": "linear_attention"}),
        "linear_value_head_dim": quotient(file, "ssm.inner_size", "ssm.time_step_rank"),
        "partial_rotary_factor": quotient(file, "rope.dimension_count", "attention.key_length"),
    }


def value_heads_in_turn(config: ModelConfig) -> dict[str, Convert]:
    """Qwen3.5's files have the first value head of each key head, then the second ones, as llama.cpp repeats keys."""
    its = next(its for its in config.attentions if isinstance(its, DeltaNet))

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
        more=of_delta_nets,
        conversions=lambda config: {"delta.decay_rate": np.negative},
    ),
    "qwen35moe": Architecture(
        *("qwen3_5_moe_text", {}, DELTA_NETS),
        names=OF_DELTA_NETS,
        more=of_delta_nets,
        conversions=value_heads_in_turn,
    ),
}
