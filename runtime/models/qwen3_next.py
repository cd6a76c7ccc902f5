"""Qwen3-Next and Qwen3-Coder-Next: three layers of gated delta nets to one of attention, which has an output gate and
rotates a quarter of each head; the stored weights of norms are less by 1; a shared expert with a gate."""

import numpy as np

from ..config import Mixer, ModelConfig
from ..config_keys import Keys
from ..layers.attention import Attention
from ..layers.delta_net import DeltaNet
from ..layers.mlp import RouterConfig
from .family import (
    Family,
    Packed,
    Rows,
    conv_read,
    conv_stored,
    experts,
    grouped,
    layer_count,
    layer_kinds,
    model,
    no_bias,
    stack,
)
from .qwen2_moe import sparse_dense

KINDS = ("linear_attention", "full_attention")
DEFAULTS = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "num_key_value_heads": 2,
}


def parse(keys: Keys) -> ModelConfig:
    return text_model(keys, RouterConfig(renormalise=keys.flag("norm_topk_prob")), sparse_dense(keys))


def text_model(
    keys: Keys,
    router: RouterConfig,
    dense: tuple[int, ...] = (),
    full: tuple[str, ...] = KINDS[1:],
    partial: float = 0.25,
    **values,
) -> ModelConfig:
    """Layers of both kinds, with the given router; the layers in `dense` have no experts. full: names of attention;
    partial: the part of a head that is rotated, unless config.json says."""
    no_bias(keys)
    keys_and_values = grouped(keys, partial=partial, qk_norm="head", output_gate=True)
    delta_net = DeltaNet(
        heads=keys.count("linear_num_value_heads"),
        kv_heads=keys.count("linear_num_key_heads"),
        head_dim=keys.count("linear_key_head_dim"),
        value_dim=keys.count("linear_value_head_dim"),
        conv_kernel=keys.count("linear_conv_kernel_dim"),
    )
    mixers: dict[str, Mixer] = {KINDS[0]: delta_net, **dict.fromkeys(full, keys_and_values)}
    routed = experts(keys, router, shared_hidden=keys.count("shared_expert_intermediate_size"))
    return model(keys, stack(keys, [mixers[kind] for kind in kinds(keys, full)], routed, dense), **values)


def kinds(keys: Keys, full: tuple[str, ...]) -> list[str]:
    """The kind of each layer: KINDS[0] or one of the names in `full`."""
    default = None
    if keys.nullable("layer_types") is None:
        every = keys.count("full_attention_interval", default=4)
        default = [KINDS[(layer + 1) % every == 0] for layer in range(layer_count(keys))]
    return layer_kinds(keys, (KINDS[0], *full), default)


def queries_and_gates(attention: Mixer) -> dict[str, Rows]:
    """The rows of q_proj: for each head its query, then its gate."""
    if not isinstance(attention, Attention):
        return {}
    n = attention.head_dim
    return {
        part: tuple((2 * head * n + first, n) for head in range(attention.heads))
        for part, first in (("q", 0), ("o_gate", n))
    }


def _of_key_heads(its: DeltaNet, sizes: dict[str, int]) -> dict[str, Rows]:
    """The rows of a tensor that has, for each key head, so many rows of each part in turn."""
    rows, at = {}, 0
    for part, size in sizes.items():
        rows[part] = tuple((head * sum(sizes.values()) + at, size) for head in range(its.kv_heads))
        at += size
    return rows


def _joined(attention: Mixer) -> dict[str, Rows]:
    """The rows of in_proj_qkvz, which has for each key head its query, key, values and gates."""
    if not isinstance(attention, DeltaNet):
        return {}
    values = attention.heads // attention.kv_heads * attention.value_dim
    sizes = {"q": attention.head_dim, "k": attention.head_dim, "v": values, "z": values}
    rows = _of_key_heads(attention, sizes)
    return {"delta.qkv": rows["q"] + rows["k"] + rows["v"], "delta.gate": rows["z"]}


def _joined_gates(attention: Mixer) -> dict[str, Rows]:
    """The rows of in_proj_ba, likewise."""
    if not isinstance(attention, DeltaNet):
        return {}
    shared = attention.heads // attention.kv_heads
    return _of_key_heads(attention, {"delta.write": shared, "delta.decay": shared})


NORMS = ("attention_norm", "mlp_norm", "output_norm", "q_norm", "k_norm")
NAMES = {
    **{f"shared.{part}": f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
    "delta.qkv": "linear_attn.in_proj_qkv.weight",
    "delta.gate": "linear_attn.in_proj_z.weight",
    "delta.write": "linear_attn.in_proj_b.weight",
    "delta.decay": "linear_attn.in_proj_a.weight",
    "delta.conv": "linear_attn.conv1d.weight",
    "delta.decay_bias": "linear_attn.dt_bias",
    "delta.decay_rate": "linear_attn.A_log",
    "delta.norm": "linear_attn.norm.weight",
    "delta.o": "linear_attn.out_proj.weight",
}
PACKED = (
    Packed("self_attn.q_proj.weight", queries_and_gates),
    Packed("linear_attn.in_proj_qkvz.weight", _joined),
    Packed("linear_attn.in_proj_ba.weight", _joined_gates),
)
CONVERSIONS = {name: lambda weight: weight + 1 for name in NORMS}
CONVERSIONS |= {"delta.conv": conv_read, "delta.decay_rate": np.exp}
STORED_AS = {"delta.conv": conv_stored}

FAMILY = Family(
    "qwen3_next",
    parse,
    {**DEFAULTS, "decoder_sparse_step": 1, "norm_topk_prob": True},
    NAMES,
    packed=PACKED,
    stored_as=STORED_AS,
    conversions=CONVERSIONS,
)
