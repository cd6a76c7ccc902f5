"""Kimi-K2.5 as a text model: DeepSeek-V3's inside a wrapper; what sees pictures is left aside."""

from .deepseek_v3 import DEFAULTS, parse
from .family import Family

FAMILY = Family(
    "kimi_k25",
    parse,
    DEFAULTS,
    text="text_config",
    prefixes=("language_model.model.", "model.language_model."),
    layers=("layers", "blocks"),  # transformers saves the second
    heads=("language_model.lm_head.weight", "lm_head.weight"),
)
