"""Qwen3.5 and Qwen3.6 MoE, saved without the wrapper."""

from dataclasses import replace

from .qwen3_5_moe import FAMILY as WRAPPED

FAMILY = replace(WRAPPED, model_type="qwen3_5_moe_text", text="", prefixes=("model.", ""))
