"""Massive activations: calibrated rounding is no worse than rounding to nearest, anywhere, of any size."""

import numpy as np
import pytest
from test_round_layers import go_through, random_ids
from test_sensitivity import Changed

from edge_moe.compressor.rounding.quantise import dequantise, quantise
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.score import log_softmax

GROUP = 32
TOKENS = 8  # of a held-out sequence


def expert_row(checkpoint, layer, scale) -> dict:
    """One expert adds a massive value to one channel of the residual stream."""
    gate, up, down = (matrix.copy() for matrix in checkpoint.expert(layer, 1))
    down[5] *= scale
    return {(layer, 1): (gate, up, down)}


def inner_neuron(checkpoint, layer, scale) -> dict:
    """One input of every down is massive, its weights small: the model computes what it did."""
    changes = {}
    for expert in range(checkpoint.config.experts):
        gate, up, down = (matrix.copy() for matrix in checkpoint.expert(layer, expert))
        up[3] *= scale
        down[:, 3] /= scale
        changes[layer, expert] = gate, up, down
    return changes


def normed_channel(checkpoint, layer, scale) -> dict:
    """One input of gate, up and router is massive, its weights small: the model computes what it did."""
    norm, router = (checkpoint.trunk(f"layers.{layer}.{name}").copy() for name in ("mlp_norm", "router"))
    norm[7] *= scale
    router[:, 7] /= scale
    changes = {f"layers.{layer}.mlp_norm": norm, f"layers.{layer}.router": router}
    for expert in range(checkpoint.config.experts):
        gate, up, down = (matrix.copy() for matrix in checkpoint.expert(layer, expert))
        gate[:, 7] /= scale
        up[:, 7] /= scale
        changes[layer, expert] = gate, up, down
    return changes


def some_tokens(checkpoint, layer, scale) -> dict:
    """A few tokens have a massive value in one channel of the residual stream from the embedding on."""
    embedding = checkpoint.trunk("embedding").copy()
    embedding[:3, 2] = scale * np.abs(embedding).mean()
    return {"embedding": embedding}


class Nearest:
    """Weights with every expert rounded to nearest."""

    def __init__(self, weights, width: int):
        self.weights, self.width, self.trunk = weights, width, weights.trunk

    def expert(self, layer: int, expert: int):
        packed = (quantise(m, self.width, GROUP, search=False) for m in self.weights.expert(layer, expert))
        return [
            dequantise(one, self.width, m.shape[1])
            for one, m in zip(packed, self.weights.expert(layer, expert), strict=True)
        ]


class Trail:
    """A model's way through some tokens: the experts chosen in each layer, and the predictions, (rows, vocab)."""

    def __init__(self, config, weights, ids):
        x, chosen = reference.embed(config, weights, ids), []
        for layer in range(config.layer_count):
            a = x + reference.attention_block(config, weights, layer, x)
            h = reference.mlp_input(config, weights, layer, a)
            chosen.append(np.sort(reference.route(config, weights, layer, h)[0], axis=-1))
            x = a + reference.moe_block(config, weights, layer, a).reshape(a.shape)
        self.chosen = np.concatenate(chosen, axis=-1)
        self.predictions = log_softmax(reference.head(config, weights, x).reshape(ids.size, -1))

    def compared(self, other: "Trail") -> tuple[np.ndarray, np.ndarray]:
        """Of each row, the divergence of another's predictions, and whether it and all before it chose the same."""
        divergence = (np.exp(self.predictions) * (self.predictions - other.predictions)).sum(-1)
        same = (self.chosen == other.chosen).all(axis=-1).reshape(-1, TOKENS)
        return divergence, np.logical_and.accumulate(same, axis=1).reshape(-1)


@pytest.mark.parametrize("where", [expert_row, inner_neuron, normed_channel, some_tokens])
@pytest.mark.parametrize("scale", [30, 30_000])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe"])
def test_calibrated_is_no_worse_than_to_nearest(golden, architecture, scale, where):
    """On text that nothing was fitted to.

    A token that changes its experts costs a thousand times as much as rounding does, and which few do is chance: so a
    token's divergence counts up to five times the median of rounding to nearest. Where one expert adds a massive value,
    a change of its routing weight is more than all of rounding; the figures of one sample then lie up to 0.05 from the
    mean, and eight samples are taken together.
    """
    checkpoint = Checkpoint(golden[architecture][0])
    config, samples = checkpoint.config, 8 if where is expert_row and scale == 30_000 else 1
    weights = Changed(checkpoint, where(checkpoint, config.moe_layers[0], scale))
    for width in (2, 4, 8):
        ratios, shares = [], np.zeros(2)
        for sample in range(samples):
            calibration = random_ids(config, sequences=12, seed=4 + sample)
            held_out = random_ids(config, sequences=160, tokens=TOKENS, seed=99 + sample)
            source, written = Trail(config, weights, held_out), {}
            go_through(checkpoint, weights, calibration, (width,) * 3, 32, written=written)
            ours, kept = source.compared(Trail(config, Changed(weights, written), held_out))
            nearest, kept_too = source.compared(Trail(config, Nearest(weights, width), held_out))
            most = 5 * np.median(nearest)
            ratios.append(np.minimum(ours, most).mean() / np.minimum(nearest, most).mean())
            shares += kept.mean(), kept_too.mean()
        assert np.mean(ratios) <= 1.02
        assert shares[0] >= 0.9 * shares[1]
