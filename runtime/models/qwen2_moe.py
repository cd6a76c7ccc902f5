"""Qwen1.5-MoE and Qwen2-MoE: biases of queries, keys and values, and a shared expert with a gate."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, experts, grouped, layer_count, model, no_windows, stack


def parse(keys: Keys) -> ModelConfig:
    no_windows(keys)
    router = RouterConfig(renormalise=keys.flag("norm_topk_prob"))
    routed = experts(keys, router, shared_hidden=keys.count("shared_expert_intermediate_size"))
    return model(keys, stack(keys, grouped(keys, bias=keys.flag("qkv_bias")), routed, sparse_dense(keys)))


def sparse_dense(keys: Keys) -> tuple[int, ...]:
    """The layers without experts: those in mlp_only_layers, and of the rest all but every decoder_sparse_step-th."""
    step = keys.count("decoder_sparse_step")
    dense = keys.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(x) is not int for x in dense):
        raise ValueError(f"{keys.where}: mlp_only_layers is {dense!r}, expected a list of layer numbers")
    return tuple(layer for layer in range(layer_count(keys)) if layer in dense or (layer + 1) % step)


FAMILY = Family(
    "qwen2_moe",
    parse,
    {"num_key_value_heads": 16, "norm_topk_prob": False, "qkv_bias": True, "decoder_sparse_step": 1},
    {f"shared.{part}": f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")},
)
