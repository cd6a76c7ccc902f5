"""Gemma 4's multimodal wrapper as a text model; the parts for vision and audio are ignored."""

from dataclasses import replace

from . import gemma4_text

FAMILY = replace(
    gemma4_text.FAMILY,
    model_type="gemma4",
    text="text_config",
    prefixes=("model.language_model.", "language_model.model.", "language_model."),
    heads=("lm_head.weight", "language_model.lm_head.weight"),
)
