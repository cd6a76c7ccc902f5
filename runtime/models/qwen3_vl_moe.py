"""Qwen3-VL-MoE as a text model: Qwen3-MoE inside a wrapper; the vision part is ignored. A text token has one position,
so the three sections of its rotary embedding agree."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family, fused, separate
from .qwen3_moe import text_model


def parse(keys: Keys) -> ModelConfig:
    return text_model(keys, RouterConfig(renormalise=True))


FAMILY = Family(
    "qwen3_vl_moe",
    parse,
    {"num_key_value_heads": 16, "decoder_sparse_step": 1, "rope_theta": 5e5, "tie_word_embeddings": True},
    layouts=(fused(transposed=True), fused(), separate("mlp.experts", "gate_proj", "up_proj", "down_proj")),
    text="text_config",
    prefixes=("model.language_model.", "language_model."),
)
