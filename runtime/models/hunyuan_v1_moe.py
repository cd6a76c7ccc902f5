"""Hunyuan-A13B: norms of queries and keys after the rotation; a shared expert without a gate."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import Experts, RouterConfig
from .family import Family, expert_count, grouped, model, stack

NAMES = {
    "q_norm": "self_attn.query_layernorm.weight",
    "k_norm": "self_attn.key_layernorm.weight",
    "router": "mlp.gate.wg.weight",
    **{f"shared.{part}": f"mlp.shared_mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}
PER_LAYER = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")


def parse(keys: Keys) -> ModelConfig:
    keys = keys.changed(**{key: the_same(keys, key) for key in PER_LAYER})
    for key in ("use_cla", "use_mla"):
        if keys.flag(key, False):
            raise ValueError(f"{keys.where}: {key} is not supported for {keys.kind}")
    biased, hidden = keys.flag("attention_bias"), keys.count("intermediate_size")
    if keys.count("moe_intermediate_size", default=hidden) != hidden or keys.count("num_shared_expert", default=1) != 1:
        raise ValueError(f"{keys.where}: experts of another size than intermediate_size are not supported")
    experts = Experts(
        expert_count(keys, "num_experts"),
        keys.count("moe_topk"),
        hidden,
        RouterConfig(renormalise=True),
        shared_hidden=hidden,
        shared_gate=False,
    )
    attention = grouped(keys, ntk_alpha=True, bias=biased, output_bias=biased, qk_norm="head", norm_after_rope=True)
    return model(keys, stack(keys, attention, experts))


def the_same(keys: Keys, key: str):
    """The value of a key that may have one value per layer. Raises ValueError if these differ."""
    value = keys.raw.get(key)
    if not isinstance(value, list):
        return value
    if len(set(map(repr, value))) != 1:
        raise ValueError(f"{keys.where}: {key} is {value!r}; the same in every layer is supported")
    return value[0]


FAMILY = Family(
    "hunyuan_v1_moe",
    parse,
    {"attention_bias": False, "eos_token_id": 2, "moe_topk": 1, "num_experts": 1, "rms_norm_eps": 1e-5},
    names=NAMES,
)
