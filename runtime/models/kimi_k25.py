"""Kimi-K2.5 as a text model: DeepSeek-V3 inside a wrapper; the vision part is ignored."""

from .deepseek_v3 import DEFAULTS, parse
from .family import Family

FAMILY = Family(
    "kimi_k25",
    parse,
    DEFAULTS,
    text="text_config",
    prefixes=("language_model.model.", "model.language_model."),
    layers=("layers", "blocks"),  # transformers saves "blocks"
    heads=("language_model.lm_head.weight", "lm_head.weight"),
)
