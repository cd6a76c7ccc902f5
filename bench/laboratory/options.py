"""The options that reports on quality have in common: which model, and which texts."""

import argparse
from pathlib import Path

from edge_moe.bench import EMBEDDED


def add_texts(parser: argparse.ArgumentParser, tokens: int, calibration_tokens: int | None = None) -> None:
    """--model, --text and --tokens with its default, and where there is one of them --calibration and its tokens."""
    add = parser.add_argument
    add("--model", type=Path, default=EMBEDDED, help="checkpoint; by default the reference MoE")
    add("--text", type=Path, nargs="+", default=[], help="files to score; by default modules of the standard library")
    add("--tokens", type=int, default=tokens, help="of each text, its first")
    if calibration_tokens is not None:
        add("--calibration", type=Path, nargs="+", default=[], help="files; by default other modules of it")
        add("--calibration-tokens", type=int, default=calibration_tokens)
