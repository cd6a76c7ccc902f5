"""Nemotron-3 Nano: layers of Mamba-2, of attention without rotary positions, or of experts or a dense MLP alone; MLPs
of two matrices with the squared ReLU; DeepSeek-V3's router and a shared expert."""

import numpy as np

from ..config import MAX_LAYERS, Layer, Mixer, ModelConfig
from ..config_keys import Keys
from ..layers.attention import Attention
from ..layers.mamba import Mamba
from ..layers.mlp import Dense, Experts
from ..layers.rope import Rope
from .family import (
    Family,
    Layout,
    Packed,
    Rows,
    conv_read,
    conv_stored,
    expert_count,
    grouped_router,
    model,
)

KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}  # by letter of the older spelling
OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}
ONLY = {  # what a key must be, if it is there
    "attention_bias": False,
    "mamba_hidden_act": "silu",
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "use_bias": False,
}


def parse(keys: Keys) -> ModelConfig:
    for key, only in ONLY.items():
        if (value := keys.raw.get(key, only)) != only:
            raise ValueError(f"{keys.where}: {key} {value!r} is not supported for {keys.kind}; supported is {only!r}")
    layers = {
        "linear_attention": lambda: Layer(mamba(keys), None),
        "full_attention": lambda: Layer(attention(keys), None),
        "moe": lambda: Layer(None, experts(keys)),
        "mlp": lambda: Layer(None, Dense(keys.count("intermediate_size"), gated=False)),
    }
    its = {kind: layers[kind]() for kind in dict.fromkeys(kinds(keys))}
    changed = keys.changed(rms_norm_eps=keys.number("layer_norm_epsilon"))
    return model(changed, tuple(its[kind] for kind in kinds(keys)), activation="relu2")


def kinds(keys: Keys) -> list[str]:
    """The kind of each layer, a value of KINDS."""
    found = keys.raw.get("layers_block_type") or keys.raw.get("layer_types")
    if found is None:
        pattern = keys.raw.get("hybrid_override_pattern") or keys.any("layers_block_type", "hybrid_override_pattern")
        if not isinstance(pattern, str) or set(pattern) - set(KINDS):
            raise ValueError(
                f"{keys.where}: hybrid_override_pattern is {pattern!r}, expected a letter of {''.join(KINDS)} for "
                "every layer"
            )
        found = [KINDS[letter] for letter in pattern]
    if isinstance(found, list):
        found = [OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in found]
    count = keys.raw.get("num_hidden_layers")
    known = isinstance(found, list) and all(kind in KINDS.values() for kind in found)
    if not known or not 0 < len(found) <= MAX_LAYERS or count not in (None, len(found)):
        raise ValueError(
            f"{keys.where}: layers_block_type is {found!r}, expected {' or '.join(KINDS.values())} for every layer"
        )
    return found


def mamba(keys: Keys) -> Mamba:
    return Mamba(
        heads=keys.count("mamba_num_heads"),
        kv_heads=keys.count("n_groups", "mamba_n_groups"),
        head_dim=keys.count("ssm_state_size"),
        value_dim=keys.count("mamba_head_dim"),
        conv_kernel=keys.count("conv_kernel", "mamba_d_conv"),
        conv_bias=keys.flag("use_conv_bias"),
        least_step=keys.number("time_step_min", "mamba_dt_min"),  # transformers: of a prompt's tokens; here of all
    )


def attention(keys: Keys) -> Attention:
    heads = keys.count("num_attention_heads")
    return Attention(heads, keys.count("num_key_value_heads"), keys.count("head_dim"), Rope(dim=0, theta=1.0))


def experts(keys: Keys) -> Experts:
    return Experts(
        expert_count(keys, "n_routed_experts", "num_local_experts"),
        keys.count("num_experts_per_tok"),
        keys.count("moe_intermediate_size"),
        grouped_router(keys),
        shared_hidden=keys.count("moe_shared_expert_intermediate_size"),
        shared_gate=False,
        gated=False,
    )


def _joined(mixer: Mixer | None) -> dict[str, Rows]:
    """The rows of in_proj: the gate, what the convolution passes over, and the time steps."""
    if not isinstance(mixer, Mamba):
        return {}
    values, channels = mixer.heads * mixer.value_dim, mixer.channels
    return {
        "mamba.gate": ((0, values),),
        "mamba.xbc": ((values, channels),),
        "mamba.step": ((values + channels, mixer.heads),),
    }


FAMILY = Family(
    "nemotron_h",
    parse,
    {
        "conv_kernel": 4,
        "eos_token_id": 2,
        "head_dim": 128,
        "layer_norm_epsilon": 1e-5,
        "n_group": 1,
        "n_groups": 8,
        "norm_topk_prob": True,
        "num_key_value_heads": 8,
        "routed_scaling_factor": 1.0,
        "time_step_min": 0.001,
        "topk_group": 1,
        "use_conv_bias": True,
    },
    names={
        "embedding": "embeddings.weight",
        "output_norm": "norm_f.weight",
        "attention_norm": "norm.weight",
        "mlp_norm": "norm.weight",
        **{part: f"mixer.{part}_proj.weight" for part in "qkvo"},
        "mamba.conv": "mixer.conv1d.weight",
        "mamba.conv_bias": "mixer.conv1d.bias",
        "mamba.step_bias": "mixer.dt_bias",
        "mamba.decay_rate": "mixer.A_log",
        "mamba.skip": "mixer.D",
        "mamba.norm": "mixer.norm.weight",
        "mamba.o": "mixer.out_proj.weight",
        "router": "mixer.gate.weight",
        "router_bias": "mixer.gate.e_score_correction_bias",
        **{f"dense.{part}": f"mixer.{part}_proj.weight" for part in ("up", "down")},
        **{f"shared.{part}": f"mixer.shared_experts.{part}_proj.weight" for part in ("up", "down")},
    },
    layouts=(
        Layout("", "mixer.experts.{}.up_proj.weight", "mixer.experts.{}.down_proj.weight"),
        Layout("", "mixer.experts.up_proj", "mixer.experts.down_proj"),
    ),
    prefixes=("backbone.", "model.", ""),
    packed=(Packed("mixer.in_proj.weight", _joined),),
    stored_as={"mamba.conv": conv_stored},
    conversions={"mamba.conv": conv_read, "mamba.decay_rate": np.exp},
)
