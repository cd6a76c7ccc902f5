"""Measurements for users: speed, quality of a bundle on text, and this machine. bench/laboratory makes the reports."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "reference_moe"  # a small checkpoint, which distributed wheels may lack
CONFIGS = Path(__file__).parent / "configs"  # config.json files of larger models, for plans and random weights
