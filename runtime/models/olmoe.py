"""OLMoE: one norm for all heads' queries, one for all keys, and clipping; plain softmax routing."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, experts, grouped, model, no_bias, no_windows, stack


def parse(keys: Keys) -> ModelConfig:
    no_bias(keys)
    no_windows(keys)
    attention = grouped(keys, qk_norm="full", clip=keys.number("clip_qkv", default=0.0))
    router = RouterConfig(renormalise=keys.flag("norm_topk_prob"))
    routed = experts(keys, router, hidden="intermediate_size")
    return model(keys, stack(keys, attention, routed))


FAMILY = Family("olmoe", parse, {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "eos_token_id": 50279})
