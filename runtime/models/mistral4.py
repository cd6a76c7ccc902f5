"""Mistral 4: DeepSeek-V3's layers with a softmax router, and queries scaled up with the position."""

from dataclasses import replace

from ..config import ModelConfig
from ..config_keys import Keys
from ..rope_config import rope_count, rope_number
from .family import Family, experts_and_shared, first_dense, grouped_router, latent, model, stack

YARN = {  # if config.json has no rotary parameters
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def parse(keys: Keys) -> ModelConfig:
    if not (keys.raw.get("rope_parameters") or keys.raw.get("rope_scaling")):
        keys = keys.changed(rope_parameters=YARN)
    attention = replace(
        latent(keys),
        query_growth=rope_number(keys, "llama_4_scaling_beta", 0.0),
        query_context=rope_count(keys, "original_max_position_embeddings", keys.count("max_position_embeddings")),
    )
    routed = experts_and_shared(keys, grouped_router(keys, score="softmax", selection_bias=False))
    return model(keys, stack(keys, attention, routed, first_dense(keys)))


FAMILY = Family(
    "mistral4",
    parse,
    {
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "q_lora_rank": 1024,
        "rope_interleave": True,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
    },
)
