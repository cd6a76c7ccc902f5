"""Qwen3.5 and Qwen3.6 MoE as text models: Qwen3-Next with separate projections, inside a wrapper. The vision part and
the layers for multi-token prediction are ignored. A text token has one position, so the three sections of its rotary
embedding agree."""

from ..config import ModelConfig
from ..config_keys import Keys
from ..layers.mlp import RouterConfig
from .family import Family
from .qwen3_next import CONVERSIONS, DEFAULTS, NAMES, PACKED, STORED_AS, text_model


def parse(keys: Keys) -> ModelConfig:
    return text_model(keys, RouterConfig(renormalise=True))


FAMILY = Family(
    "qwen3_5_moe",
    parse,
    DEFAULTS,
    NAMES,
    text="text_config",
    prefixes=("model.language_model.", "language_model."),
    packed=PACKED,
    stored_as=STORED_AS,
    conversions=CONVERSIONS,
)
