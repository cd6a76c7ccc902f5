"""DeepSeek-V2 and V2-Lite: attention over a latent, softmax routing over all experts or within the best groups (scored
by their best expert), and shared experts."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, experts_and_shared, first_dense, latent, model, stack

METHODS = ("greedy", "group_limited_greedy")


def parse(keys: Keys) -> ModelConfig:
    method = keys.any("topk_method")
    if method not in METHODS:
        raise ValueError(f"{keys.where}: topk_method {method!r} is not supported; supported are {', '.join(METHODS)}")
    grouped = method == "group_limited_greedy"
    router = RouterConfig(
        groups=keys.count("n_group") if grouped else 1,
        top_groups=keys.count("topk_group") if grouped else 1,
        scale=keys.number("routed_scaling_factor"),
    )
    routed = experts_and_shared(keys, router, ("n_routed_experts", "num_experts"))
    return model(keys, stack(keys, latent(keys), routed, first_dense(keys)))


FAMILY = Family(
    "deepseek_v2",
    parse,
    {
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "n_shared_experts": 2,
        "q_lora_rank": 1536,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
)
