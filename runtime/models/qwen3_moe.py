"""Qwen3-MoE: a norm of queries and keys per head, no shared expert."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, experts, grouped, model, no_bias, no_windows, stack
from .qwen2_moe import sparse_dense


def parse(keys: Keys) -> ModelConfig:
    return text_model(keys, RouterConfig(renormalise=keys.flag("norm_topk_prob")))


def text_model(keys: Keys, router: RouterConfig) -> ModelConfig:
    """Qwen3-MoE, with the given router."""
    no_bias(keys)
    no_windows(keys)
    return model(keys, stack(keys, grouped(keys, qk_norm="head"), experts(keys, router), sparse_dense(keys)))


FAMILY = Family("qwen3_moe", parse, {"num_key_value_heads": 4, "norm_topk_prob": False, "decoder_sparse_step": 1})
