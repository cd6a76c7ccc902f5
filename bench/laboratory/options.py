"""The options that the quality reports share: the model and the texts."""

import argparse
from pathlib import Path

from edge_moe.bench import EMBEDDED


def add_texts(parser: argparse.ArgumentParser, tokens: int, calibration_tokens: int | None = None) -> None:
    """Add --model, --text and --tokens, and --calibration with its tokens if it has a default number of them."""
    add = parser.add_argument
    add("--model", type=Path, default=EMBEDDED, help="checkpoint; by default the reference MoE")
    add("--text", type=Path, nargs="+", default=[], help="files to score; by default modules of the standard library")
    add("--tokens", type=int, default=tokens, help="score the first N tokens of each text")
    if calibration_tokens is not None:
        add(
            "--calibration",
            type=Path,
            nargs="+",
            default=[],
            help="files to calibrate on; by default other modules of the standard library",
        )
        add("--calibration-tokens", type=int, default=calibration_tokens)
