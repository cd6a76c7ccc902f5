"""The tensors and the metadata of llama.cpp's GGUF files for our families, from our canonical names.

A part is a tensor of the file: its shape, and how its values are made of a model's canonical tensors. llama.cpp stores
some of these joined, transposed or with another sign, and has the value heads of Qwen3.5's delta nets in another order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_moe.runtime.config import Dense, Experts, ModelConfig, trunk_shapes
from edge_moe.runtime.layers.attention import Attention
from edge_moe.runtime.layers.delta_net import DeltaNet
from edge_moe.runtime.layers.mamba import Mamba
from edge_moe.runtime.layers.short_conv import ShortConv

ARCHITECTURES = {  # general.architecture, by model_type
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "lfm2_moe": "lfm2moe",
    "nemotron_h": "nemotron_h_moe",
}
NAMES = {  # in the file, by canonical name without layer
    "embedding": "token_embd.weight",
    "output_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    **{part: f"attn_{part}.weight" for part in "qkv"},
    **{f"{part}_bias": f"attn_{part}.bias" for part in "qkv"},
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "sinks": "attn_sinks.weight",
    "o": "attn_output.weight",
    "o_bias": "attn_output.bias",
    "router": "ffn_gate_inp.weight",
    "router_logit_bias": "ffn_gate_inp.bias",
    "router_bias": "exp_probs_b.bias",
    "shared_router": "ffn_gate_inp_shexp.weight",
    **{f"shared.{part}": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
    **{f"dense.{part}": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    "delta.qkv": "attn_qkv.weight",
    "delta.gate": "attn_gate.weight",
    "delta.write": "ssm_beta.weight",
    "delta.decay": "ssm_alpha.weight",
    "delta.conv": "ssm_conv1d.weight",
    "delta.decay_bias": "ssm_dt.bias",
    "delta.decay_rate": "ssm_a",
    "delta.norm": "ssm_norm.weight",
    "delta.o": "ssm_out.weight",
    "conv.weights": "shortconv.conv.weight",
    "conv.o": "shortconv.out_proj.weight",
    "mamba.conv": "ssm_conv1d.weight",
    "mamba.conv_bias": "ssm_conv1d.bias",
    "mamba.step_bias": "ssm_dt.bias",
    "mamba.decay_rate": "ssm_a",
    "mamba.skip": "ssm_d",
    "mamba.norm": "ssm_norm.weight",
    "mamba.o": "ssm_out.weight",
}
AFTER_ATTENTION = {"mlp_norm": "post_attention_norm.weight"}
OWN_NAMES = {  # by general.architecture, where they differ from NAMES
    "gpt-oss": AFTER_ATTENTION,
    "qwen35moe": AFTER_ATTENTION,
    "lfm2moe": {"output_norm": "token_embd_norm.weight"},
    "nemotron_h_moe": {"mlp_norm": "attn_norm.weight"},
    "gemma4": {
        "attention_post_norm": "post_attention_norm.weight",
        "mlp_norm": "pre_ffw_norm_2.weight",
        "router_norm": "ffn_gate_inp.scale",
        "expert_scale": "ffn_down_exps.scale",
        "experts_post_norm": "post_ffw_norm_2.weight",
        "shared_norm": "ffn_norm.weight",
        **{f"shared.{part}": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
        "shared_post_norm": "post_ffw_norm_1.weight",
        "mlp_post_norm": "post_ffw_norm.weight",
        "layer_scale": "layer_output_scale.weight",
    },
}
JOINED = {  # the rows of several tensors, one after the other
    "conv.in": ("shortconv.in_proj.weight", ("conv.write", "conv.gate", "conv.in")),
    "mamba.xbc": ("ssm_in.weight", ("mamba.gate", "mamba.xbc", "mamba.step")),
}
ELSEWHERE = {"o_gate", "conv.write", "conv.gate", "mamba.gate", "mamba.step"}  # in the parts of other tensors
TRANSPOSED = {"delta.conv", "conv.weights", "mamba.conv"}
NEGATED = {"delta.decay_rate", "mamba.decay_rate"}
COLUMNS = {"mamba.decay_rate", "mamba.skip"}  # vectors with one value a row
UNROTATED = 1e30  # divisor of the angles of pairs that are not rotated
EXPERT_PARTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the file. read: makes its values, float32, of weights with trunk(), expert() and expert_bias()."""

    name: str
    shape: tuple[int, ...]  # inputs last
    read: Callable[[object], np.ndarray]


def parts(model: ModelConfig) -> list[Part]:
    """The tensors of a model's file, in the order of use. Raises ValueError for a family that is not known here."""
    if model.architecture not in ARCHITECTURES:
        raise ValueError(f"{model.architecture} is not known here; known are {', '.join(ARCHITECTURES)}")
    kind, shapes = ARCHITECTURES[model.architecture], trunk_shapes(model)
    names = NAMES | OWN_NAMES.get(kind, {})
    found = []
    if kind == "gemma4":
        found.append(_divisors(model))
    for name in shapes:
        layer, own = _split(name)
        if own not in ELSEWHERE:
            found.append(_part(model, names, layer, own, shapes))
        if own == "router":
            found += _experts(model, layer, fused=kind == "gemma4")
    return found


def metadata(model: ModelConfig, raw: dict) -> dict[str, object]:
    """The keys of the model, without the architecture in front: whole numbers, floats, texts and lists of these.

    raw: the language model's config.json, for what ModelConfig does not keep.
    """
    kind, layers, routed = ARCHITECTURES[model.architecture], model.layers, model.routed
    its = model.attention
    own_keys = [isinstance(layer.attention, Attention) for layer in layers]
    hidden = raw.get("intermediate_size") or routed.shared_hidden
    found = {
        "vocab_size": model.vocab,
        "context_length": model.context,
        "embedding_length": model.dim,
        "block_count": len(layers),
        "feed_forward_length": hidden,
        "attention.head_count": its.heads,
        "attention.head_count_kv": its.kv_heads,
        "attention.key_length": its.head_dim,
        "attention.value_length": its.head_dim,
        "attention.layer_norm_rms_epsilon": model.norm_eps,
        "rope.freq_base": float(its.rope.theta),
        "expert_count": routed.experts,
        "expert_used_count": routed.top_k,
        "expert_feed_forward_length": routed.hidden,
    }
    if routed.shared_hidden and kind != "gemma4":
        found["expert_shared_feed_forward_length"] = routed.shared_hidden
    if kind == "gpt-oss":
        found |= {"attention.sliding_window": max(one.window for one in model.attentions)} | _yarn(its)
    elif kind == "qwen35moe":
        delta_net = next(one for one in model.attentions if isinstance(one, DeltaNet))
        found |= {
            "rope.dimension_count": its.rope.dim,
            "rope.dimension_sections": [(its.rope.dim // 2 + 2 - at) // 3 for at in range(3)] + [0],
            "ssm.conv_kernel": delta_net.conv_kernel,
            "ssm.state_size": delta_net.head_dim,
            "ssm.group_count": delta_net.kv_heads,
            "ssm.time_step_rank": delta_net.heads,
            "ssm.inner_size": delta_net.heads * delta_net.value_dim,
            "attention.recurrent_layers": [not own for own in own_keys],
        }
    elif kind == "gemma4":
        windowed = [layer.attention for layer in layers if layer.attention.window]
        full = [layer.attention for layer in layers if not layer.attention.window]
        found |= {
            "attention.head_count_kv": [layer.attention.kv_heads for layer in layers],
            "attention.key_length": full[0].head_dim,
            "attention.value_length": full[0].head_dim,
            "attention.key_length_swa": windowed[0].head_dim,
            "attention.value_length_swa": windowed[0].head_dim,
            "attention.sliding_window": windowed[0].window,
            "attention.sliding_window_pattern": [bool(layer.attention.window) for layer in layers],
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 0,
            "feed_forward_length": routed.shared_hidden,
            "final_logit_softcapping": model.logits_cap,
            "rope.freq_base": float(full[0].rope.theta),
            "rope.freq_base_swa": float(windowed[0].rope.theta),
            "rope.dimension_count": full[0].head_dim,
            "rope.dimension_count_swa": windowed[0].head_dim,
        }
    elif kind == "lfm2moe":
        convolution = next(one for one in model.attentions if isinstance(one, ShortConv))
        found |= {
            "attention.head_count_kv": [its.kv_heads * own for own in own_keys],
            "leading_dense_block_count": len(model.dense_layers),
            "expert_gating_func": 2,  # sigmoid
            "shortconv.l_cache": convolution.conv_kernel,
        }
    elif kind == "nemotron_h_moe":
        mamba = next(one for one in model.attentions if isinstance(one, Mamba))
        found |= {
            "attention.head_count_kv": [its.kv_heads * own for own in own_keys],
            "feed_forward_length": [_inner(layer.mlp) for layer in layers],
            "rope.dimension_count": its.head_dim,
            "expert_shared_count": 1,
            "expert_weights_norm": routed.router.renormalise,
            "expert_weights_scale": routed.router.scale,
            "expert_group_count": routed.router.groups,
            "expert_group_used_count": routed.router.top_groups,
            "attention.layer_norm_epsilon": model.norm_eps,
            "ssm.conv_kernel": mamba.conv_kernel,
            "ssm.state_size": mamba.head_dim,
            "ssm.group_count": mamba.kv_heads,
            "ssm.time_step_rank": mamba.heads,
            "ssm.inner_size": mamba.heads * mamba.value_dim,
        }
    return found


def _inner(mlp: Experts | Dense | None) -> int:
    return mlp.hidden if mlp else 0


def _yarn(attention: Attention) -> dict[str, object]:
    yarn = attention.rope.yarn
    if yarn is None:
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_context,
        "rope.scaling.yarn_beta_fast": yarn.beta_fast,
        "rope.scaling.yarn_beta_slow": yarn.beta_slow,
    }


def _split(name: str) -> tuple[int | None, str]:
    """A canonical name's layer and the rest."""
    if not name.startswith("layers."):
        return None, name
    _, layer, own = name.split(".", 2)
    return int(layer), own


def _part(model: ModelConfig, names: dict[str, str], layer: int | None, own: str, shapes: dict) -> Part:
    """The part that a canonical tensor is in, with those it is joined with."""
    before, inside = ("", "") if layer is None else (f"blk.{layer}.", f"layers.{layer}.")
    mixer = None if layer is None else model.layers[layer].attention
    shape, name = shapes[inside + own], names.get(own)
    if own in JOINED:
        name, together = JOINED[own]
        shape = (sum(shapes[inside + one][0] for one in together), shape[1])
        read = lambda weights: np.concatenate([weights.trunk(inside + one) for one in together])  # noqa: E731
    elif own == "q" and isinstance(mixer, Attention) and mixer.output_gate:  # each head's query, then its gate
        by_head, shape = (mixer.heads, mixer.head_dim, shape[1]), (2 * shape[0], shape[1])
        read = lambda weights: np.stack(  # noqa: E731
            [weights.trunk(inside + one).reshape(by_head) for one in ("q", "o_gate")], axis=1
        ).reshape(shape)
    else:
        if own in TRANSPOSED:
            shape = shape[::-1]
        elif own in COLUMNS:
            shape = (*shape, 1)
        elif own == "mamba.norm":
            shape = (mixer.kv_heads, shape[0] // mixer.kv_heads)
        elif own == "shared_router":
            shape = shape[1:]
        sign = -1 if own in NEGATED else 1

        def read(weights) -> np.ndarray:
            values = weights.trunk(inside + own) * np.float32(sign)
            values = values.T if own in TRANSPOSED else values
            return np.ascontiguousarray(values).reshape(shape)

    if own.startswith("delta."):
        return Part(before + name, shape, lambda weights: _in_turn(mixer, own, read(weights)))
    return Part(before + name, shape, read)


def _in_turn(its: DeltaNet, own: str, values: np.ndarray) -> np.ndarray:
    """A delta net's tensor with the value heads of each key head no longer side by side: first those that are the first
    of a key head, then the second ones."""
    if own == "delta.norm":
        return values
    keys = 2 * its.kv_heads * its.head_dim if own in ("delta.qkv", "delta.conv") else 0
    size = 1 if own in ("delta.write", "delta.decay", "delta.decay_bias", "delta.decay_rate") else its.value_dim
    heads = np.arange(its.heads * size).reshape(its.kv_heads, its.heads // its.kv_heads, size)
    order = np.concatenate([np.arange(keys), keys + heads.swapaxes(0, 1).ravel()])
    return values[:, order] if own == "delta.o" else values[order]


def _experts(model: ModelConfig, layer: int, fused: bool) -> list[Part]:
    """The routed experts of a layer: one tensor for each product, or one for gate and up together."""

    def stacked(method: str, *which: int) -> Callable[[object], np.ndarray]:
        def read(weights) -> np.ndarray:
            each = [getattr(weights, method)(layer, index) for index in range(model.experts)]
            return np.stack([np.concatenate([its[at] for at in which]) for its in each])

        return read

    count, shapes, before = model.experts, model.expert_shapes, f"blk.{layer}.ffn_"
    gate, up, down = shapes
    if fused:
        return [
            Part(f"{before}gate_up_exps.weight", (count, gate[0] + up[0], model.dim), stacked("expert", 0, 1)),
            Part(f"{before}down_exps.weight", (count, *down), stacked("expert", 2)),
        ]
    found = []
    for at, (name, shape) in enumerate(zip(EXPERT_PARTS, shapes, strict=True)):
        if shape[0]:
            found.append(Part(f"{before}{name}_exps.weight", (count, *shape), stacked("expert", at)))
            if model.expert_bias:
                found.append(Part(f"{before}{name}_exps.bias", (count, shape[0]), stacked("expert_bias", at)))
    return found


def _divisors(model: ModelConfig) -> Part:
    """The divisors of the angles in layers without a window, where some pairs are not rotated."""
    its = next(layer.attention for layer in model.layers if not layer.attention.window)
    rotated, pairs = its.rope.dim // 2, its.head_dim // 2
    values = np.repeat(np.float32([its.rope.factor, UNROTATED]), [rotated, pairs - rotated])
    return Part("rope_freqs.weight", (pairs,), lambda _weights: values)
