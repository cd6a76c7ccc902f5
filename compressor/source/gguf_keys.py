"""Keys of config.json that are computed from a GGUF file's metadata, or read off its tensors."""

import math
from collections.abc import Mapping

import numpy as np

from .gguf_file import GgufFile

SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
NOT_ROTATED = 1e20  # the least divisor of an angle that leaves a pair as it is


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


def of_gemma4(file: GgufFile) -> dict[str, object]:
    """Keys of Gemma 4, whose layers with a window and without one differ in their heads and angles."""
    windowed, kv_heads = file.value("attention.sliding_window_pattern"), file.value("attention.head_count_kv")
    kv_heads = kv_heads if isinstance(kv_heads, list) else [kv_heads] * file.layers
    for key, its in (("attention.sliding_window_pattern", windowed), ("attention.head_count_kv", kv_heads)):
        if not isinstance(its, list) or len(its) != file.layers:
            raise ValueError(f"{file.path}: {key} is {its!r}, expected a value for each of the {file.layers} layers")
    kinds = ["sliding_attention" if its else "full_attention" for its in windowed]
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
    if count == 0 or divisors[0] >= NOT_ROTATED or (divisors[:count] != divisors[0]).any():
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

    Older files do not say which, and have the sizes of heads where newer ones have those of the latent. Some lack the
    groups of experts, without which tokens would go to others.
    """
    biased = any(name.endswith("exp_probs_b.bias") for name in file.tensors)
    gating = file.value("expert_gating_func") or (SIGMOID if biased else SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID) or biased != (gating == SIGMOID):
        raise ValueError(
            f"{file.path}: expert_gating_func {gating} with{'' if biased else 'out'} exp_probs_b is not supported; "
            f"supported are {SOFTMAX} (softmax) without it and {SIGMOID} (sigmoid) with it"
        )
    if file.value("attention.temperature_scale"):
        raise ValueError(f"{file.path}: attention.temperature_scale is not supported for deepseek2")
    renormalised, groups = bool(file.value("expert_weights_norm")), file.value("expert_group_count")
    if groups is None:
        what = "expert_group_count is missing, as in older files"
        raise ValueError(f"{file.path}: {what}; put the model's config.json beside the file")
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
