"""Gemma 4 with experts: windows and global layers with heads of their own, a dense MLP beside the experts, seven norms
in a layer."""

from ..config import Layer, ModelConfig
from ..config_keys import Keys
from ..layers.attention import Attention
from ..layers.mlp import Experts, RouterConfig
from ..rope_config import read_rope
from .family import Family, Layout, expert_count, layer_count, model

WINDOW, GLOBAL = "sliding_attention", "full_attention"
GLOBAL_EVERY = 6  # layers, if config.json does not say which are global
PER_LAYER = ("head_dim", "num_key_value_heads")  # keys that per_layer_config may change
ROPES = {
    WINDOW: {"rope_type": "default", "rope_theta": 1e4},
    GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def parse(keys: Keys) -> ModelConfig:
    if not keys.flag("enable_moe_block"):
        raise ValueError(
            f"{keys.where}: enable_moe_block is false; this is a dense model, and edge-moe runs mixtures of experts"
        )
    for key, what in (
        ("hidden_size_per_layer_input", "inputs of each layer"),
        ("num_kv_shared_layers", "layers that share keys and values"),
    ):
        if (value := keys.any(key)) != 0:
            raise ValueError(f"{keys.where}: {key} is {value!r}, {what} are not supported; supported is 0")
    if (value := keys.nullable("use_bidirectional_attention")) not in (None, "vision"):
        raise ValueError(
            f"{keys.where}: use_bidirectional_attention is {value!r}, expected null or 'vision', where text is causal"
        )
    dim = keys.count("hidden_size")
    experts = Experts(
        expert_count(keys, "num_experts"),
        keys.count("top_k_experts"),
        keys.count("moe_intermediate_size"),
        RouterConfig(renormalise=True, logits_scale=dim**-0.5, expert_scale=True),
        shared_hidden=keys.count("intermediate_size"),
        shared_gate=False,
        own_norms=True,
    )
    cap = keys.nullable("final_logit_softcapping")
    return model(
        keys.changed(hidden_act=keys.any("hidden_activation")),
        tuple(Layer(attention, experts) for attention in attentions(keys)),
        embedding_scale=dim**0.5,
        logits_cap=0.0 if cap is None else keys.above_zero("final_logit_softcapping"),
        post_norms=True,
        layer_scale=True,
    )


def attentions(keys: Keys) -> list[Attention]:
    """The attention of each layer."""
    types, heads, biased = layer_types(keys), keys.count("num_attention_heads"), keys.flag("attention_bias")
    found = []
    for of_layer, kind in zip(of_layers(keys, types), types, strict=True):
        head_dim = of_layer.count("head_dim")
        found.append(
            Attention(
                heads,
                of_layer.count("num_key_value_heads"),
                head_dim,
                read_rope(with_rope(keys, kind), head_dim, types=("default", "linear", "proportional")),
                bias=biased,
                output_bias=biased,
                qk_norm="head",
                window=keys.count("sliding_window") if kind == WINDOW else 0,
                scale=1.0,
                keys_as_values=keys.flag("attention_k_eq_v") and kind == GLOBAL,
                v_norm=True,
            )
        )
    return found


def layer_types(keys: Keys) -> list[str]:
    """The type of each layer; the last is global, whatever config.json says."""
    count = layer_count(keys)
    types = keys.nullable("layer_types")
    if types is None:
        types = [WINDOW if (layer + 1) % GLOBAL_EVERY else GLOBAL for layer in range(count)]
    if not isinstance(types, list) or len(types) != count or any(kind not in (WINDOW, GLOBAL) for kind in types):
        raise ValueError(f"{keys.where}: layer_types is {types!r}, expected {WINDOW} or {GLOBAL} for every layer")
    return [*types[:-1], GLOBAL]


def of_layers(keys: Keys, types: list[str]) -> list[Keys]:
    """The keys of each layer, where head_dim and num_key_value_heads may differ."""
    if "per_layer_config" in keys.raw:
        given, changes = keys.raw["per_layer_config"] or {}, {}
        if not isinstance(given, dict) or not all(isinstance(its, dict) for its in given.values()):
            raise ValueError(f"{keys.where}: per_layer_config is {given!r}, expected an object for each layer number")
        numbers = {name: int(name) for name in given if name.isdecimal() and len(name) <= 9}  # 5 or 05
        for name, its in given.items():
            known = numbers.get(name, len(types)) < len(types)
            if wrong := [name] * (not known) or [key for key in its if key not in PER_LAYER]:
                raise ValueError(
                    f"{keys.where}: per_layer_config has {wrong[0]!r}; supported are {' and '.join(PER_LAYER)} of "
                    f"layers 0 to {len(types) - 1}"
                )
            changes[numbers[name]] = its
        return [keys.changed(**changes.get(layer, {})) for layer in range(len(types))]
    of_global = {"head_dim": keys.count("global_head_dim")}
    if keys.flag("attention_k_eq_v") and keys.nullable("num_global_key_value_heads") is not None:
        of_global["num_key_value_heads"] = keys.count("num_global_key_value_heads")
    return [keys.changed(**of_global) if kind == GLOBAL else keys for kind in types]


def with_rope(keys: Keys, kind: str) -> Keys:
    """The keys with one layer type's RoPE parameters as those of the model."""
    ropes = keys.nullable("rope_parameters")
    its = (ROPES if ropes is None else ropes if isinstance(ropes, dict) else {}).get(kind)
    if not isinstance(its, dict) or its.get("rope_theta") is None:
        raise ValueError(
            f"{keys.where}: rope_parameters has no {kind} with a rope_theta, expected one for each layer type"
        )
    return keys.changed(rope_parameters=its, rope_scaling=None, rope_theta=None, partial_rotary_factor=None)


FAMILY = Family(
    "gemma4_text",
    parse,
    {
        "attention_bias": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "eos_token_id": 1,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 9216,
        "max_position_embeddings": 131_072,
        "num_attention_heads": 8,
        "num_hidden_layers": 30,
        "num_key_value_heads": 4,
        "num_kv_shared_layers": 0,
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "vocab_size": 262_144,
    },
    names={
        "attention_post_norm": "post_attention_layernorm.weight",
        "mlp_norm": "pre_feedforward_layernorm_2.weight",
        "router_norm": "router.scale",
        "router": "router.proj.weight",
        "expert_scale": "router.per_expert_scale",
        "experts_post_norm": "post_feedforward_layernorm_2.weight",
        "shared_norm": "pre_feedforward_layernorm.weight",
        "shared_post_norm": "post_feedforward_layernorm_1.weight",
        "mlp_post_norm": "post_feedforward_layernorm.weight",
        "layer_scale": "layer_scalar",
        **{f"shared.{part}": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    },
    layouts=(Layout("experts.gate_up_proj", "", "experts.down_proj"),),
)
