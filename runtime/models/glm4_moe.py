"""GLM-4.5, 4.6 and 4.7 with their Air models: half of each head's dimensions are rotated; DeepSeek-V3's router."""

from ..config import ModelConfig
from ..config_keys import Keys
from .family import Family, experts_and_shared, first_dense, grouped, grouped_router, model, stack


def parse(keys: Keys) -> ModelConfig:
    attention = grouped(
        keys,
        partial=0.5,
        bias=keys.flag("attention_bias"),
        qk_norm="head" if keys.flag("use_qk_norm") else "none",
    )
    return model(keys, stack(keys, attention, experts_and_shared(keys, grouped_router(keys)), first_dense(keys)))


FAMILY = Family(
    "glm4_moe",
    parse,
    {
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    },
)
