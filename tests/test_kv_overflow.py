"""A KV cache in float16 that a key, a value or a latent does not fit in: said by name, and nothing of it is kept.

The models are those of transformers, with what is cached times a power of two and what reads it divided by it: in full
precision every product is the same but for its exponent, so float32 gives the same bits as the model that was scaled.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from bundles import logits_of, same_bits, write_lossless
from golden_checkpoints import write_checkpoint

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.runtime import Runtime

SCALE = np.float32(2.0**24)
SCALED = {  # architecture, and what of each layer is times SCALE to which power
    "values": ("mixtral", {".v": 1, ".o": -1}),
    "keys": ("mixtral", {".k": 1, ".q": -1}),
    "latents": ("deepseek_v3", {".kv_a_norm": 1, ".kv_b": -1}),
}


class Changed:
    """A checkpoint's weights with some of the trunk's changed: change(name, weights) -> weights."""

    def __init__(self, checkpoint: Checkpoint, change):
        self.trunk = lambda name: change(name, checkpoint.trunk(name))
        self.expert = checkpoint.expert


def lossless(directory: Path, architecture: str, change=lambda name, weights: weights) -> tuple[Path, list[int]]:
    source, ids, _ = write_checkpoint(architecture, directory / "source")
    with Checkpoint(source) as checkpoint:
        path = write_lossless(directory / "b.emoe", source, checkpoint.config, Changed(checkpoint, change))
    return path, [int(token) for token in ids]


def times(powers: dict[str, int]):
    def change(name: str, weights: np.ndarray) -> np.ndarray:
        power = next((power for end, power in powers.items() if name.endswith(end)), 0)
        return weights * SCALE ** np.float32(power)

    return change


@pytest.mark.parametrize("what", SCALED)
def test_an_overflow_names_float32_which_is_right_and_no_later_call_goes_on_from_it(tmp_path, what):
    architecture, powers = SCALED[what]
    plain, ids = lossless(tmp_path / "plain", architecture)
    path, _ = lossless(tmp_path / "scaled", architecture, times(powers))
    assert same_bits(logits_of(path, ids, ram="2GB"), logits_of(plain, ids, ram="2GB"))
    message = (
        rf"{re.escape(str(path))}: a key or value is beyond what a KV cache in float16 holds: "
        r'pass kv="float32" \(--kv float32\), \d+\.\d MB more for 64 tokens of context'
    )
    with Runtime(path, "2GB", 64, threads=2) as runtime:
        for call in (lambda: runtime.generate(ids, 4), lambda: runtime.logits(ids), lambda: runtime.generate(ids, 1)):
            with pytest.raises(ValueError, match=f"^{message}$"):
                call()
            assert (runtime._session.sequences.all[0].tokens, runtime._engine.position) == ([], 0)


def test_what_fits_is_kept_when_a_later_token_overflows(tmp_path):
    """One token has an embedding along one axis, and a value reads that axis alone."""
    odd = 3

    def change(name: str, weights: np.ndarray) -> np.ndarray:
        weights = weights.copy()
        if name == "embedding":
            weights[:, 0] = 0
            weights[odd] = 0
            weights[odd, 0] = 1
        if name == "layers.0.v":
            weights[0, 0] = 2.0**20
        return weights

    path, ids = lossless(tmp_path, "mixtral", change)
    ids = [token for token in ids if token != odd][:10]
    with Runtime(path, "2GB", 64, threads=1) as runtime:
        want = runtime.logits(ids)
        runtime.generate(ids, 1)
        with pytest.raises(ValueError, match="beyond what a KV cache in float16 holds"):
            runtime.generate([*ids, odd], 4)
        assert runtime._session.sequences.all[0].tokens == ids
        np.testing.assert_array_equal(runtime.logits(ids), want)
