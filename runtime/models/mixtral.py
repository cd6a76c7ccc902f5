"""Mixtral: grouped-query attention, with a sliding window in the first releases; softmax over the chosen experts."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, experts, fused, grouped, model, separate, stack


def parse(keys: Keys) -> ModelConfig:
    window = keys.count("sliding_window") if keys.raw.get("sliding_window") is not None else 0
    routed = experts(keys, RouterConfig(renormalise=True), hidden="intermediate_size")
    return model(keys, stack(keys, grouped(keys, window=window), routed))


FAMILY = Family(
    "mixtral",
    parse,
    {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "eos_token_id": 2},
    layouts=(
        separate("block_sparse_moe.experts", "w1", "w3", "w2", names={"router": "block_sparse_moe.gate.weight"}),
        fused(),
    ),
)
