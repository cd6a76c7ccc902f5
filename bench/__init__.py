"""What users measure with: speed, quality of a bundle on text, this machine. bench/laboratory makes the reports."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "reference_moe"  # a small checkpoint; wheels for others may be without
CONFIGS = Path(__file__).parent / "configs"  # config.json of larger models, for plans and random weights
