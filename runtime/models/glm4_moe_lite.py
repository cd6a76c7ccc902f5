"""GLM-4.7-Flash: DeepSeek-V3's layers at another size; config.json lists the layers that have experts."""

from ..config import ModelConfig
from ..config_keys import Keys
from .family import Family, experts_and_shared, first_dense, grouped_router, latent, layer_count, model, stack


def parse(keys: Keys) -> ModelConfig:
    return model(keys, stack(keys, latent(keys), experts_and_shared(keys, grouped_router(keys)), dense_by_type(keys)))


def dense_by_type(keys: Keys) -> tuple[int, ...]:
    """The dense layers, by mlp_layer_types or, if it is missing, by first_k_dense_replace."""
    count = layer_count(keys)
    kinds = keys.raw.get("mlp_layer_types")
    if kinds is None:
        first = keys.any("first_k_dense_replace", default=1)
        return first_dense(keys.changed(first_k_dense_replace=first, moe_layer_freq=None))
    if not isinstance(kinds, list) or len(kinds) < count or any(one not in ("dense", "sparse") for one in kinds):
        raise ValueError(f"{keys.where}: mlp_layer_types is {kinds!r}, expected dense or sparse for every layer")
    return tuple(layer for layer in range(count) if kinds[layer] == "dense")


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
