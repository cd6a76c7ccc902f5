"""DeepSeek-V3.2: DeepSeek-V3's layers, whose attention goes to the positions that an indexer chooses for each query."""

from ..config import ModelConfig
from ..config_keys import Keys
from .family import Family, dense_by_type, experts_and_shared, grouped_router, model, sparse_latent, stack

DEFAULTS = {
    "eos_token_id": 1,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}


def parse(keys: Keys) -> ModelConfig:
    routed = experts_and_shared(keys, grouped_router(keys))
    return model(keys, stack(keys, sparse_latent(keys, interleaved=False), routed, dense_by_type(keys, first=3)))


FAMILY = Family("deepseek_v32", parse, DEFAULTS)
