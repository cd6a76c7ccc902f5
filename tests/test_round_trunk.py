"""Rounding the trunk: which tensors are, what attention's last matrix aims at, and what it gains over the nearest."""

import numpy as np
import pytest
from bundles import weights_of
from golden_checkpoints import ARCHITECTURES, CHECKPOINTS
from test_inputs import step_by_definition
from test_round_layers import go_through, heads, random_ids
from test_trunk import kind_of

from edge_moe.compressor.rounding import round_layers, round_trunk
from edge_moe.compressor.rounding.gptq import Curvature, damping_for, gptq
from edge_moe.compressor.rounding.quantise import dequantise, quantise
from edge_moe.compressor.rounding.round_trunk import fitted_rows
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.layers.arrays import grouped
from edge_moe.runtime.score import log_softmax


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_matrix_but_the_embedding_is_fitted_once(golden, monkeypatch, name):
    checkpoint, put = Checkpoint(golden[name][0]), []
    keep = round_layers.PackedTrunk.put
    monkeypatch.setattr(
        round_layers.PackedTrunk, "put", lambda self, name, packed: (put.append(name), keep(self, name, packed))
    )
    go_through(checkpoint, checkpoint, random_ids(checkpoint.config, sequences=2), (16,) * 3, 4)
    wanted = [name for name in checkpoint.trunk_names() if kind_of(name) not in (None, "embedding")]
    assert sorted(put) == sorted(name for name in wanted if checkpoint.shape(name)[1] % 32 == 0)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v3", "mixtral", "granitemoe"])
def test_attention_aims_at_what_its_stream_lacks(golden, tmp_path, architecture):
    """The last layer's output projection, from the definition."""
    checkpoint = Checkpoint(golden[architecture][0])
    c, out, ids = checkpoint.config, tmp_path / "new.emoe", random_ids(checkpoint.config, sequences=12)
    go_through(checkpoint, checkpoint, ids, (2, 2, 3), 3, out=out)
    made, layer = weights_of(out), c.layer_count - 1
    name, seen = f"layers.{layer}.o", {}

    class Seen:
        trunk = staticmethod(made.trunk)

        def product(self, its, x):
            seen[its] = x.reshape(-1, x.shape[-1])
            return x @ made.trunk(its).T

    def until(weights):
        x = reference.embed(c, weights, ids)
        for before in range(layer):
            x = reference.layer(c, weights, before, x)
        return x

    x, source_x = until(made), until(checkpoint)
    reference.attention_block(c, Seen(), layer, x)
    wanted = (source_x + reference.attention_block(c, checkpoint, layer, source_x)).reshape(-1, c.dim)
    x, inputs, matrix = x.reshape(-1, c.dim), seen[name], checkpoint.trunk(name)
    count = 1 / (np.square(wanted).sum(-1) + np.square(wanted - x).sum(-1))
    bias = checkpoint.trunk(f"layers.{layer}.o_bias") if c.attention.output_bias else 0
    step = step_by_definition(inputs, count, (wanted - x) / c.residual_scale - bias - inputs @ matrix.T)
    share = (count / count.sum())[:, None]
    curvature = Curvature.of((inputs * share).T @ inputs, damping_for(*inputs.shape))
    group = 64 if matrix.shape[1] % 64 == 0 else 32
    expected = dequantise(gptq((matrix + step).astype(np.float32), curvature, 3, group), 3, matrix.shape[1])
    found = made.trunk(name)
    assert np.square(found - expected).sum() < 0.02 * np.square(found - matrix).sum()  # ties of float32 fall either way


@pytest.mark.parametrize("wide", [False, True])
def test_each_group_of_rows_is_rounded_for_its_own_inputs(golden, tmp_path, monkeypatch, wide):
    """The first layer's o_a, from the definition. wide: there is room for both groups at a time."""
    checkpoint = Checkpoint(golden["deepseek_v4"][0])
    c, name, out, ids = checkpoint.config, "layers.0.o_a", tmp_path / "new.emoe", random_ids(checkpoint.config, 12)
    if wide:
        monkeypatch.setattr(round_trunk, "widest_input", lambda config: 1000)
    go_through(checkpoint, checkpoint, ids, (16,) * 3, 3, out=out)
    made, seen = weights_of(out), []

    class Seen:
        def __init__(self, weights):
            self.trunk = weights.trunk

        def grouped_product(self, _, x):
            seen.append(x.reshape(-1, *x.shape[-2:]))
            return grouped(x, self.trunk(name))

    for weights in (made, checkpoint):
        reference.attention_block(c, Seen(weights), 0, reference.embed(c, weights, ids))
    matrix, found = checkpoint.trunk(name), made.trunk(name)
    for group, rows in enumerate(np.split(np.arange(len(matrix)), c.attention.groups)):
        x, source_x = (one[:, group] for one in seen)
        step = step_by_definition(x, np.ones(len(x)), (source_x - x) @ matrix[rows].T)
        curvature = Curvature.of(x.T @ x / len(x), damping_for(*x.shape))
        expected = dequantise(gptq((matrix[rows] + step).astype(np.float32), curvature, 3, 32), 3, matrix.shape[1])
        difference = np.square(found[rows] - expected).sum()
        assert difference < 0.02 * np.square(found[rows] - matrix[rows]).sum()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "deepseek_v4", "gemma4_text", "granitemoe", "phimoe"])
def test_a_fitted_trunk_is_closer_than_one_rounded_to_nearest(golden, architecture):
    """On text that nothing was fitted to, experts as they are."""
    checkpoint = Checkpoint(golden[architecture][0])
    config, held_out = checkpoint.config, random_ids(checkpoint.config, sequences=8, seed=11)
    ids = np.concatenate([random_ids(config, sequences=24), held_out])

    class Nearest:
        expert = staticmethod(checkpoint.expert)

        def trunk(self, name):
            tensor = checkpoint.trunk(name)
            if kind_of(name) is None:
                return tensor
            group = 64 if tensor.shape[1] % 64 == 0 else 32
            return dequantise(quantise(tensor, 3, group), 3, tensor.shape[1])

    rounding = go_through(checkpoint, checkpoint, ids, (16,) * 3, 3, calibration_rows=24 * 128)
    source, fitted = (log_softmax(logits[24 * 128 :]) for logits in heads(rounding))
    nearest = log_softmax(reference.forward(config, Nearest(), held_out).reshape(source.shape))
    ours, its = ((np.exp(source) * (source - one)).sum(-1).mean() for one in (fitted, nearest))
    assert ours < 0.9 * its


def test_the_rows_to_fit_to_are_whole_sequences_spread_over_all(golden):
    config = Checkpoint(golden["mixtral"][0]).config
    rows = fitted_rows(config, 400 * 128, 128).reshape(-1, 128)
    assert len(rows) == 128
    assert (rows[0, 0], rows[-1, -1]) == (0, 400 * 128 - 1)
    assert (np.diff(rows, axis=1) == 1).all()
    assert (rows[:, 0] % 128 == 0).all()
    np.testing.assert_array_equal(fitted_rows(config, 3 * 128, 128), np.arange(3 * 128))
