"""Rebuilds the checkpoints of tests/golden, with neither torch nor transformers; make_golden.py made them."""

from pathlib import Path

import numpy as np

ARCHITECTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def write_checkpoint(architecture: str, directory: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write config.json and model.safetensors; gives directory, token_ids (tokens,), logits (tokens, vocab).

    The logits are those of transformers, in float32.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with np.load(Path(__file__).parent / "golden" / f"{architecture}.npz") as golden:
        (directory / "config.json").write_text(str(golden["config"]))
        (directory / "model.safetensors").write_bytes(golden["weights"].tobytes())
        return directory, golden["token_ids"], golden["logits"]
