"""Phi-3.5-MoE: LayerNorms, biases in attention and output head, SparseMixer's router, LongRoPE."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, experts, fused, grouped, model, separate, stack


def parse(keys: Keys) -> ModelConfig:
    if keys.count("num_experts_per_tok") != 2:  # transformers uses two, whatever config.json says
        raise ValueError(f"{keys.where}: num_experts_per_tok is {keys.any('num_experts_per_tok')!r}, expected 2")
    window = keys.count("sliding_window") if keys.raw.get("sliding_window") is not None else 0
    biased = keys.flag("attention_bias")
    attention = grouped(keys, types=("default", "longrope"), bias=biased, output_bias=biased, window=window)
    router = RouterConfig("sparsemixer", threshold=2 * keys.number("router_jitter_noise"))
    routed = experts(keys, router, ("num_local_experts",), "intermediate_size")
    return model(keys, stack(keys, attention, routed), norm="layer", head_bias=keys.flag("lm_head_bias"))


FAMILY = Family(
    "phimoe",
    parse,
    {
        "attention_bias": False,
        "eos_token_id": 2,
        "lm_head_bias": False,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "router_jitter_noise": 0.01,
    },
    names={"router": "mlp.router.weight"},
    layouts=(
        separate("block_sparse_moe.experts", "w1", "w3", "w2", names={"router": "block_sparse_moe.gate.weight"}),
        fused(),
    ),
)
