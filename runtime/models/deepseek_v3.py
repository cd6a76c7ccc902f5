"""DeepSeek-V3, R1 and derived models such as Moonlight and Kimi-K2: attention over a latent, a sigmoid router with
groups and a load-balancing bias, shared experts, dense first layers."""

from ..config import ModelConfig
from ..config_keys import Keys
from .family import Family, experts_and_shared, first_dense, grouped_router, latent, model, stack

DEFAULTS = {
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "rope_interleave": True,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}


def parse(keys: Keys) -> ModelConfig:
    return model(keys, stack(keys, latent(keys), experts_and_shared(keys, grouped_router(keys)), first_dense(keys)))


FAMILY = Family("deepseek_v3", parse, DEFAULTS)
