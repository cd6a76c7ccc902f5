"""Writes checkpoints of newer families as GGUF files in float32, as llama.cpp's converter does.

Names of tensors are the package gguf's. What the converter changes besides is in `converted`, and what it writes about
the model in METADATA.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from test_checkpoint import bf16, read_file

ARCHITECTURES = {
    "qwen3_next": "QWEN3NEXT",
    "qwen3_5_moe_text": "QWEN35MOE",
    "gemma4_text": "GEMMA4",
    "lfm2_moe": "LFM2MOE",
    "nemotron_h": "NEMOTRON_H_MOE",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "glm4_moe_lite": "DEEPSEEK2",
    "granitemoe": "GRANITE_MOE",
    "ernie4_5_moe": "ERNIE4_5_MOE",
    "hunyuan_v1_moe": "HUNYUAN_MOE",
}
ADDED_ONE = ("qwen3_next", "qwen3_5_moe_text")  # families whose norms are stored less by 1
STATE_SPACES = ("ssm_a", "ssm_d")  # which have neither .weight nor .bias in their names
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def write(source: Path, out: Path, old: bool = False, joined: bool = False, changes: dict | None = None) -> None:
    """Write the checkpoint in a directory as one file.

    old: with the names that older files have. joined: with gates and ups of experts in one tensor, and with keys and
    values of latents in one besides. changes: of keys of the metadata, None for none.
    """
    raw = json.loads((source / "config.json").read_text())
    raw = raw.get("text_config", raw)
    kind = raw["model_type"]
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[kind]]
    tensors = with_joined(stacked(source)) if joined else stacked(source)
    if kind == "gemma4_text":
        tensors["rope_freqs.weight"] = gemma4_divisors(raw)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_tokenizer_model("none")
    writer.add_eos_token_id(1)
    for key, value in ({**usual_metadata(raw), **METADATA[kind](raw, old)} | (changes or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(f"{writer.arch}.{key}", value)
    names = gguf.get_tensor_name_map(architecture, raw.get("num_hidden_layers") or len(raw["layers_block_type"]))
    of_dense = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
    for key, tensor in tensors.items():
        for new_key, values in converted(kind, raw, key, tensor, old):
            ends = {"try_suffixes": (".weight", ".bias")}
            name = names.get_name(new_key, **ends) or of_dense.get_name(new_key, **ends)
            if name is None and new_key.startswith(("blk.", "rope_freqs")):
                name = new_key
            assert name, f"{new_key} has no name"
            if not name.endswith((".weight", ".bias", ".scale", *STATE_SPACES)):
                name += ".bias" if name.endswith("exp_probs_b") else ".weight"
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stacked(source: Path) -> dict[str, np.ndarray]:
    """The tensors of the language model without its prefix, with the experts of a layer in one."""
    tensors, experts = {}, {}
    for key, (_, shape, data) in read_file(source / "model.safetensors").items():
        if ".vision" in key or "embed_vision" in key or ".visual" in key or key.startswith("mtp."):
            continue
        key, values = key.replace("language_model.", ""), bf16(data).reshape(shape)
        before, _, rest = key.partition(".experts.")
        if rest and rest[0].isdecimal():
            number, part, end = rest.split(".")
            experts.setdefault(f"{before}.experts.{PARTS.get(part, part)}.{end}", {})[int(number)] = values
        else:
            tensors[key] = values
    return tensors | {key: np.stack([its[at] for at in sorted(its)]) for key, its in experts.items()}


def gemma4_divisors(raw: dict) -> np.ndarray:
    """What the angles of each pair are divided by in global layers, which makes those that are not rotated nearly 0."""
    pairs = raw["per_layer_config"][str(raw["num_hidden_layers"] - 1)]["head_dim"] // 2
    rotated = int(pairs * raw["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    return np.repeat([1.0, 1e30], [rotated, pairs - rotated])


def with_joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with the gates and ups of the experts of a layer in one, and a copy of what makes keys and values."""
    tensors |= {f"blk.{key.split('.')[2]}.attn_kv_b.weight": its for key, its in tensors.items() if "kv_b_proj" in key}
    gates = [key for key in tensors if key.endswith(".experts.gate_proj.weight")]
    for key in gates:
        gate, up = tensors.pop(key), tensors.pop(key.replace("gate_proj", "up_proj"))
        tensors[f"blk.{key.split('.')[2]}.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
    return tensors


def usual_metadata(raw: dict) -> dict:
    """The keys that most architectures have."""
    rope = raw.get("rope_parameters") or {}
    experts = next((raw[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in raw), None)
    heads = raw["num_attention_heads"]
    return {
        "vocab_size": raw["vocab_size"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "block_count": raw.get("num_hidden_layers"),
        "feed_forward_length": raw.get("intermediate_size") or 0,
        "attention.head_count": heads,
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": raw.get("head_dim") or raw["hidden_size"] // heads,
        "attention.value_length": raw.get("head_dim") or raw["hidden_size"] // heads,
        "attention.layer_norm_rms_epsilon": next(
            (raw[key] for key in ("rms_norm_eps", "norm_eps") if key in raw), None
        ),
        "rope.freq_base": float(rope["rope_theta"]) if "rope_theta" in rope else None,
        "expert_count": experts,
        "expert_used_count": raw.get("num_experts_per_tok"),
        "expert_feed_forward_length": raw.get("moe_intermediate_size"),
    }


def of_qwen3_next(raw: dict, _old: bool) -> dict:
    rope = raw["rope_parameters"]
    rotated = int(raw["head_dim"] * rope.get("partial_rotary_factor", 0.25))
    sections = rope.get("mrope_section") or [(rotated // 2 + 2 - at) // 3 for at in range(3)]
    return {
        "ssm.conv_kernel": raw["linear_conv_kernel_dim"],
        "ssm.state_size": raw["linear_key_head_dim"],
        "ssm.group_count": raw["linear_num_key_heads"],
        "ssm.time_step_rank": raw["linear_num_value_heads"],
        "ssm.inner_size": raw["linear_value_head_dim"] * raw["linear_num_value_heads"],
        "full_attention_interval": raw["layer_types"].index("full_attention") + 1,
        "rope.dimension_count": rotated,
        "rope.dimension_sections": [*sections, 0] if raw["model_type"] != "qwen3_next" else None,
        "expert_shared_feed_forward_length": raw["shared_expert_intermediate_size"],
    }


def of_gemma4(raw: dict, _old: bool) -> dict:
    ropes, windowed = raw["rope_parameters"], [kind == "sliding_attention" for kind in raw["layer_types"]]
    of_layers = [raw | raw["per_layer_config"].get(str(layer), {}) for layer in range(len(windowed))]
    return {
        "attention.head_count_kv": [its["num_key_value_heads"] for its in of_layers],
        "attention.key_length": of_layers[-1]["head_dim"],
        "attention.value_length": of_layers[-1]["head_dim"],
        "attention.key_length_swa": raw["head_dim"],
        "attention.value_length_swa": raw["head_dim"],
        "attention.sliding_window": raw["sliding_window"],
        "attention.sliding_window_pattern": windowed,
        "attention.shared_kv_layers": raw["num_kv_shared_layers"],
        "embedding_length_per_layer_input": raw["hidden_size_per_layer_input"],
        "final_logit_softcapping": raw["final_logit_softcapping"],
        "expert_used_count": raw["top_k_experts"],
        "rope.freq_base": float(ropes["full_attention"]["rope_theta"]),
        "rope.freq_base_swa": float(ropes["sliding_attention"]["rope_theta"]),
        "rope.dimension_count": of_layers[-1]["head_dim"],
        "rope.dimension_count_swa": raw["head_dim"],
    }


def of_lfm2(raw: dict, _old: bool) -> dict:
    return {
        "attention.head_count_kv": [
            raw["num_key_value_heads"] * (kind == "full_attention") for kind in raw["layer_types"]
        ],
        "leading_dense_block_count": raw["num_dense_layers"],
        "expert_gating_func": 2,
        "shortconv.l_cache": raw["conv_L_cache"],
    }


def of_nemotron(raw: dict, _old: bool) -> dict:
    kinds = raw["layers_block_type"]
    return {
        "block_count": len(kinds),
        "attention.head_count_kv": [raw["num_key_value_heads"] * (kind == "full_attention") for kind in kinds],
        "attention.layer_norm_rms_epsilon": raw["layer_norm_epsilon"],
        "attention.layer_norm_epsilon": raw["layer_norm_epsilon"],
        "feed_forward_length": [raw["moe_intermediate_size"] * (kind == "moe") for kind in kinds],
        "expert_shared_feed_forward_length": raw["moe_shared_expert_intermediate_size"],
        "expert_shared_count": raw["n_shared_experts"],
        "expert_weights_norm": raw["norm_topk_prob"],
        "expert_weights_scale": raw["routed_scaling_factor"],
        "expert_group_count": raw["n_group"],
        "expert_group_used_count": raw["topk_group"],
        "rope.dimension_count": raw["head_dim"],
        "ssm.conv_kernel": raw["conv_kernel"],
        "ssm.state_size": raw["ssm_state_size"],
        "ssm.group_count": raw["n_groups"],
        "ssm.time_step_rank": raw["mamba_num_heads"],
        "ssm.inner_size": raw["mamba_num_heads"] * raw["mamba_head_dim"],
    }


def of_deepseek(raw: dict, old: bool) -> dict:
    rope, head = raw["rope_parameters"], raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"]
    ends = "" if old else "_mla"
    found = {
        "attention.head_count_kv": raw["num_attention_heads"] if old else 1,
        "attention.key_length": raw["kv_lora_rank"] + raw["qk_rope_head_dim"],
        "attention.value_length": raw["kv_lora_rank"],
        f"attention.key_length{ends}": head,
        f"attention.value_length{ends}": raw["v_head_dim"],
        "attention.q_lora_rank": raw["q_lora_rank"],
        "attention.kv_lora_rank": raw["kv_lora_rank"],
        "rope.dimension_count": raw["qk_rope_head_dim"],
        "leading_dense_block_count": raw.get("first_k_dense_replace", 1),
        "expert_shared_count": raw["n_shared_experts"],
        "expert_weights_scale": float(raw["routed_scaling_factor"]),
        "expert_weights_norm": True if raw.get("norm_topk_prob") else None,
        "expert_gating_func": 1 if raw["model_type"] == "deepseek_v2" else 2,
        "expert_group_count": raw.get("n_group") or 1,
        "expert_group_used_count": raw.get("topk_group") or 1,
    }
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
            "rope.scaling.yarn_beta_fast": rope["beta_fast"],
            "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        }
    return found


def of_granite(raw: dict, _old: bool) -> dict:
    return {
        "attention.scale": raw["attention_multiplier"],
        "embedding_scale": raw["embedding_multiplier"],
        "residual_scale": raw["residual_multiplier"],
        "logit_scale": raw["logits_scaling"],
    }


def of_ernie(raw: dict, _old: bool) -> dict:
    return {
        "expert_count": raw["moe_num_experts"],
        "expert_used_count": raw["moe_k"],
        "interleave_moe_layer_step": raw["moe_layer_interval"],
        "leading_dense_block_count": raw["moe_layer_start_index"],
        "expert_shared_count": raw["moe_num_shared_experts"],
        "expert_shared_feed_forward_length": raw["intermediate_size"] // raw["num_key_value_heads"],
    }


def of_hunyuan(raw: dict, _old: bool) -> dict:
    rope, head_dim = raw["rope_parameters"], raw["head_dim"]
    return {
        "expert_feed_forward_length": raw["intermediate_size"],
        "expert_shared_feed_forward_length": raw["intermediate_size"],
        "expert_shared_count": 1,
        "expert_used_count": raw["moe_topk"],
        "rope.freq_base": rope["rope_theta"] * rope["alpha"] ** (head_dim / (head_dim - 2)),
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1.0,
    }


METADATA = {
    "qwen3_next": of_qwen3_next,
    "qwen3_5_moe_text": of_qwen3_next,
    "gemma4_text": of_gemma4,
    "lfm2_moe": of_lfm2,
    "nemotron_h": of_nemotron,
    "deepseek_v2": of_deepseek,
    "deepseek_v3": of_deepseek,
    "glm4_moe_lite": of_deepseek,
    "granitemoe": of_granite,
    "ernie4_5_moe": of_ernie,
    "hunyuan_v1_moe": of_hunyuan,
}


def converted(kind: str, raw: dict, key: str, values: np.ndarray, old: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that the converter makes of one, by names that the package gguf knows or by GGUF's own."""
    if kind == "nemotron_h" and key.endswith((".A_log", ".D")):
        values = values[:, None]
    if key.endswith(".A_log"):
        values = -np.exp(values)
    elif key.endswith(".dt_bias"):
        key = key.replace(".dt_bias", ".dt_proj.bias" if kind != "nemotron_h" else ".dt.bias")
    elif ".conv1d.weight" in key or ".conv.conv." in key:
        values = values[:, 0]
    elif key.endswith((".router.scale", ".router.per_expert_scale")):
        part = "ffn_gate_inp" if key.endswith(".router.scale") else "ffn_down_exps"
        key = f"blk.{key.split('.')[2]}.{part}.scale"
    elif key.endswith(".e_score_correction_bias"):
        values = values.ravel()
        key = f"blk.{key.split('.')[2]}.exp_probs_b.bias"
    elif ".mixer.experts." in key:
        key = key.replace("backbone", "model").replace(".mixer.", ".mlp.")
    elif kind == "nemotron_h" and key.endswith(".mixer.norm.weight"):
        values = values.reshape(raw["n_groups"], -1)
    elif key.endswith("shared_expert_gate.weight"):
        values = values[0]
    elif kind in ADDED_ONE and key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
        values = values + 1
    if kind == "qwen3_next" and key.endswith("in_proj_qkvz.weight") and not old:
        yield from _of_key_heads(raw, key, values)
    elif kind == "qwen3_5_moe_text" and ".linear_attn." in key:
        yield key, _in_turn(raw, key.partition(".linear_attn.")[2], values)
    elif key.endswith("block_sparse_moe.input_linear.weight"):
        for part, its in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
            yield f"blk.{key.split('.')[2]}.ffn_{part}_exps.weight", its
    elif kind == "granitemoe" and ("q_proj" in key or "k_proj" in key):  # the rows of a pair next to each other
        pairs = values.reshape(-1, 2, raw["hidden_size"] // raw["num_attention_heads"] // 2, *values.shape[1:])
        yield key, pairs.swapaxes(1, 2).reshape(values.shape)
    elif key.endswith("kv_b_proj.weight") and not old:
        heads = values.reshape(raw["num_attention_heads"], -1, raw["kv_lora_rank"])
        yield key.replace("kv_b_proj", "k_b_proj"), heads[:, : raw["qk_nope_head_dim"]].swapaxes(1, 2)
        yield key.replace("kv_b_proj", "v_b_proj"), heads[:, raw["qk_nope_head_dim"] :]
    else:
        yield key, values


def _of_key_heads(raw: dict, key: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Qwen3-Next has the rows of each key head side by side, llama.cpp those of all queries, keys and values."""
    heads, head, layer = raw["linear_num_key_heads"], raw["linear_key_head_dim"], key.split(".")[2]
    of_values = raw["linear_num_value_heads"] // heads * raw["linear_value_head_dim"]
    parts = np.split(values.reshape(heads, -1, values.shape[1]), np.cumsum([head, head, of_values]), axis=1)
    q, k, v, z = (part.reshape(-1, values.shape[1]) for part in parts)
    yield f"blk.{layer}.attn_qkv.weight", np.concatenate([q, k, v])
    yield f"blk.{layer}.attn_gate.weight", z


def _in_turn(raw: dict, part: str, values: np.ndarray) -> np.ndarray:
    """Value heads in the order of llama.cpp: the first ones of all key heads, then the second ones."""
    keys, heads, size = raw["linear_num_key_heads"], raw["linear_num_value_heads"], raw["linear_value_head_dim"]
    if part == "norm.weight":
        return values
    before = 2 * keys * raw["linear_key_head_dim"] if part in ("in_proj_qkv.weight", "conv1d.weight") else 0
    width = size if part in ("in_proj_qkv.weight", "conv1d.weight", "in_proj_z.weight", "out_proj.weight") else 1
    of_values = np.arange(heads * width).reshape(keys, heads // keys, width).swapaxes(0, 1).ravel()
    order = np.concatenate([np.arange(before), before + of_values])
    return values[:, order] if part == "out_proj.weight" else values[order]
