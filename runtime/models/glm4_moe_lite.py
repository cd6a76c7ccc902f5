"""GLM-4.7-Flash: DeepSeek-V3's layers at another size; config.json lists the layers that have experts."""

from ..config import ModelConfig
from ..config_keys import Keys
from .family import Family, dense_by_type, experts_and_shared, grouped_router, latent, model, stack


def parse(keys: Keys) -> ModelConfig:
    routed = experts_and_shared(keys, grouped_router(keys))
    return model(keys, stack(keys, latent(keys), routed, dense_by_type(keys, first=1)))


FAMILY = Family(
    "glm4_moe_lite",
    parse,
    {
        "eos_token_id": 1,
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "q_lora_rank": 768,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
        "topk_group": 1,
    },
)
