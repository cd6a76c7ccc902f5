"""MiniMax-M2 and M2.1: some of each head's dimensions are rotated, one norm for all heads' queries, one for all keys; a
sigmoid router with a load-balancing bias."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, experts, fused, grouped, model, no_windows, separate, stack


def parse(keys: Keys) -> ModelConfig:
    no_windows(keys)
    head_dim = keys.count("head_dim")
    partial = keys.count("rotary_dim", default=head_dim) / head_dim
    router = RouterConfig(score="sigmoid", renormalise=True, selection_bias=True)
    routed = experts(keys, router, ("num_local_experts", "num_experts"), "intermediate_size")
    return model(keys, stack(keys, grouped(keys, partial=partial, qk_norm="full"), routed))


FAMILY = Family(
    "minimax_m2",
    parse,
    {"eos_token_id": 200020, "head_dim": 128, "num_key_value_heads": 8, "rope_theta": 5e6},
    names={"router_bias": "mlp.e_score_correction_bias"},
    layouts=(
        separate(
            *("block_sparse_moe.experts", "w1", "w3", "w2"),
            names={
                "router": "block_sparse_moe.gate.weight",
                "router_bias": "block_sparse_moe.e_score_correction_bias",
            },
        ),
        fused(),
    ),
)
