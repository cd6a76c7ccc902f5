"""Granite 3 MoE: multipliers of embeddings, of additions to the residual stream, of attention scores and of logits."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, Layout, experts, fused, grouped, model, stack


def parse(keys: Keys) -> ModelConfig:
    biased = keys.flag("attention_bias")
    attention = grouped(keys, bias=biased, output_bias=biased, scale=keys.number("attention_multiplier"))
    routed = experts(keys, RouterConfig(renormalise=True), ("num_local_experts",), "intermediate_size")
    return model(
        keys,
        stack(keys, attention, routed),
        embedding_scale=keys.number("embedding_multiplier"),
        residual_scale=keys.number("residual_multiplier"),
        logits_scale=1 / keys.above_zero("logits_scaling"),
    )


FAMILY = Family(
    "granitemoe",
    parse,
    {
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "eos_token_id": 2,
        "logits_scaling": 1.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "residual_multiplier": 1.0,
    },
    names={"router": "block_sparse_moe.router.weight"},
    layouts=(
        Layout(
            *("block_sparse_moe.input_linear.weight", "", "block_sparse_moe.output_linear.weight"),
            names={"router": "block_sparse_moe.router.layer.weight"},
        ),
        fused("block_sparse_moe.experts"),
    ),
)
