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
from ...runtime.models.family import conv_read
from .gguf_file import GgufFile
from .names import KEYS_OF_LATENT, VALUES_OF_LATENT

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
NOT_ROTATED = 1e20  # the least divisor of an angle that leaves a pair as it is
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
    """One `general.architecture`: the model_type, and keys of config.json."""

    model_type: str
    always: dict[str, object]  # unless the metadata says else
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


def rope_scaling(file: GgufFile, always: Mapping[str, object]) -> dict[str, object] | None:
    """The object of config.json. always: what parameters are, whatever the metadata says."""
    kind, factor = file.value("rope.scaling.type"), file.value("rope.scaling.factor")
    if kind in (None, "none") or factor is None:
        return None
    original = file.value("rope.scaling.original_context_length")
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    scaling |= {f"beta_{side}": file.value(f"rope.scaling.yarn_beta_{side}") for side in ("fast", "slow")}
    return {key: value for key, value in (scaling | always).items() if value is not None}


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


def of_gemma4(file: GgufFile) -> dict[str, object]:
    """Keys of Gemma 4, whose layers with a window and without one differ in their heads and angles."""
    windowed, kv_heads = file.value("attention.sliding_window_pattern"), file.value("attention.head_count_kv")
    if not isinstance(windowed, list) or len(windowed) != file.layers:
        raise ValueError(
            f"{file.path}: attention.sliding_window_pattern is {windowed!r}, expected true or false for each of the "
            f"{file.layers} layers"
        )
    kinds = ["sliding_attention" if its else "full_attention" for its in windowed]
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * file.layers
    widths = {False: file.value("attention.key_length"), True: file.value("attention.key_length_swa")}
    its_own = zip(widths.items(), ("rope.dimension_count", "rope.dimension_count_swa"), strict=True)
    if wrong := [key for (_, width), key in its_own if file.value(key) not in (None, width)]:
        raise ValueError(f"{file.path}: {wrong[0]} is {file.value(wrong[0])}, expected all of a head's dimensions")
    return {
        "layer_types": kinds,
        "head_dim": widths[True],
        "per_layer_config": {
            str(layer): {"head_dim": widths[its], "num_key_value_heads": heads}
            for layer, (its, heads) in enumerate(zip(windowed, kv_heads, strict=True))
        },
        "attention_k_eq_v": any(f"blk.{layer}.attn_v.weight" not in file.tensors for layer in range(file.layers)),
        "rope_theta": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": file.value("rope.freq_base_swa")},
            "full_attention": {"rope_type": "proportional", "rope_theta": file.value("rope.freq_base")}
            | rotated_share(file),
        },
    }


def rotated_share(file: GgufFile) -> dict[str, object]:
    """The share of a head's pairs that RoPE rotates, the first ones, and what divides their angles; the others' divisor
    is so large that they stay as they are."""
    if (tensor := file.tensors.get("rope_freqs.weight")) is None:
        return {"partial_rotary_factor": 1.0}
    size = math.prod(tensor.shape) if tensor.dtype == "F32" else 0
    divisors = np.fromfile(tensor.path, np.float32, size, offset=tensor.offset)
    count = int((divisors < NOT_ROTATED).sum())
    if count == 0 or (divisors[:count] != divisors[0]).any():
        raise ValueError(f"{file.path}: tensor rope_freqs.weight (rescaled RoPE frequencies) is not supported")
    return {"partial_rotary_factor": count / divisors.size, "factor": float(divisors[0])}


def of_lfm2(file: GgufFile) -> dict[str, object]:
    """Keys of LFM2."""
    return {
        "layer_types": layer_kinds(file, {"attn_q": "full_attention", "shortconv.conv": "conv"}),
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in file.tensors),
    }


def of_nemotron(file: GgufFile) -> dict[str, object]:
    """Keys of Nemotron-H."""
    kinds = {"ssm_in": "linear_attention", "attn_q": "full_attention", "ffn_gate_inp": "moe", "ffn_up": "mlp"}
    found = layer_kinds(file, kinds)
    dense = file.tensors[f"blk.{found.index('mlp')}.ffn_up.weight"].shape[0] if "mlp" in found else None
    return {
        "layers_block_type": found,
        "intermediate_size": dense,
        "mamba_head_dim": quotient(file, "ssm.inner_size", "ssm.time_step_rank"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
        "n_group": file.value("expert_group_count") or 1,
        "topk_group": file.value("expert_group_used_count") or 1,
    }


def of_deepseek(file: GgufFile) -> dict[str, object]:
    """Keys of DeepSeek-V2, where routing weights are a softmax, and of V3 and what derives from it.

    Older files do not say which, and have the sizes of heads where newer ones have those of the latent.
    """
    biased = any(name.endswith("exp_probs_b.bias") for name in file.tensors)
    gating = file.value("expert_gating_func") or (SIGMOID if biased else SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID) or biased != (gating == SIGMOID):
        raise ValueError(
            f"{file.path}: expert_gating_func {gating} with{'' if biased else 'out'} exp_probs_b is not supported; "
            f"supported are {SOFTMAX} (softmax) without it and {SIGMOID} (sigmoid) with it"
        )
    renormalised, groups = bool(file.value("expert_weights_norm")), file.value("expert_group_count") or 1
    if gating == SOFTMAX and renormalised:
        raise ValueError(f"{file.path}: expert_weights_norm true is not supported with expert_gating_func {SOFTMAX}")
    scaling, multiplier = rope_scaling(file, {}), file.value("rope.scaling.yarn_log_multiplier")
    if scaling and multiplier:  # a tenth of the factor of the softmax, which rotated queries and keys do not get again
        scaling |= dict.fromkeys(("mscale", "mscale_all_dim"), float(f"{10 * multiplier:.7g}"))
    rope_dim = file.value("rope.dimension_count") or 0
    head, value = (file.value(f"attention.{kind}_length_mla") for kind in ("key", "value"))
    return {
        "model_type": "deepseek_v3" if gating == SIGMOID else "deepseek_v2",
        "rope_scaling": scaling,
        "qk_nope_head_dim": (head or file.value("attention.key_length") or 0) - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": value or file.value("attention.value_length"),
        "norm_topk_prob": renormalised,
        "n_group": groups,
        "topk_group": file.value("expert_group_used_count") or 1,
        "topk_method": "noaux_tc" if gating == SIGMOID else "group_limited_greedy" if groups > 1 else "greedy",
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
}
