"""Rebuilds the checkpoints of tests/golden, with neither torch nor transformers; make_golden.py made them.

DROPPED are versions of them that lack experts and use fewer: by architecture, `kept` and `layer_top_k` of ModelConfig.
"""

from pathlib import Path

import numpy as np

ARCHITECTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3")  # whose parts differ most
FAMILIES = (
    *("deepseek_v2", "deepseek_v32", "deepseek_v4", "ernie4_5_moe", "gemma4", "gemma4_text", "glm4_moe"),
    *("glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "kimi_k25", "lfm2_moe"),
    *("minimax_m2", "mistral3", "mistral4", "nemotron_h", "phimoe", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("qwen3_next", "qwen3_vl_moe", "qwen4_exp", "qwen4_exp_text"),
)
CHECKPOINTS = (*ARCHITECTURES, "moonlight", *FAMILIES)  # moonlight is another deepseek_v3
DROPPED = {
    "mixtral": (((0, 2, 3, 5, 7), (1, 4, 6)), (2, 1)),
    "olmoe": (((0, 1, 2, 3, 4, 5, 6, 7), (3, 5, 6)), (2, 3)),
    "qwen2_moe": (((1, 2, 4, 5, 7), (), (0, 3, 6, 7)), (1, 0, 2)),
    "qwen3_moe": (((0, 2, 5), (1, 2, 3, 4, 5)), ()),
    # The first two layers look experts up by token; some tokens have none of them left in the second.
    "deepseek_v4": (((0, 1, 3, 5, 6, 7), (1, 4, 6), (0, 2, 3, 5), (1, 2, 6, 7), (0, 3, 4)), (3, 3, 3, 2, 3)),
    # Of the four groups of four one is gone in each layer; any two of the others have enough for top_k.
    "deepseek_v3": (((), (0, 3, 8, 9, 12, 13, 14, 15), (0, 2, 4, 7, 8, 9, 11)), (0, 4, 3)),
}


def write_checkpoint(name: str, directory: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Write config.json and model.safetensors; gives directory, token_ids (tokens,), logits (tokens, vocab).

    The logits are those of transformers, in float32.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as golden:
        (directory / "config.json").write_text(str(golden["config"]))
        (directory / "model.safetensors").write_bytes(golden["weights"].tobytes())
        return directory, golden["token_ids"], golden["logits"]


def dropped_logits(architecture: str) -> np.ndarray:
    """Logits (tokens, vocab) that transformers gives for the same token ids without the experts of DROPPED."""
    with np.load(Path(__file__).parent / "golden" / "dropped.npz") as golden:
        return golden[architecture]
