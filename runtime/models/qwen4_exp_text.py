"""Qwen4-Exp, saved without the wrapper."""

from dataclasses import replace

from .qwen4_exp import FAMILY as WRAPPED

FAMILY = replace(WRAPPED, model_type="qwen4_exp_text", text="", prefixes=("model.", ""))
