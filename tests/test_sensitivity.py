"""Measuring: errors and gains are those of a direct computation, whatever the experts, workers or streams."""

from dataclasses import fields, replace

import numpy as np
import pytest
from golden_checkpoints import ARCHITECTURES

from edge_moe.compressor.choosing.sensitivity import (
    LayerMeasure,
    Sensitivity,
    load_measure,
    save_measure,
)
from edge_moe.compressor.passes.calibrate import Calibration
from edge_moe.compressor.passes.expert_rows import LEAST_ROWS
from edge_moe.compressor.passes.streams import Stream
from edge_moe.compressor.rounding.gptq import Curvature, damping_for, gptq
from edge_moe.compressor.rounding.quantise import dequantise
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.score import log_softmax

CHOICES = [(2, 32), (4, 32), (8, 32)]
CARRIED = 0


class Changed:
    """A checkpoint with some tensors replaced: by name, or an expert's three by (layer, expert)."""

    def __init__(self, checkpoint, changes: dict):
        self.checkpoint, self.changes = checkpoint, changes

    def trunk(self, name: str) -> np.ndarray:
        return self.changes[name] if name in self.changes else self.checkpoint.trunk(name)

    def expert(self, layer: int, expert: int):
        found = self.changes.get((layer, expert))
        return self.checkpoint.expert(layer, expert) if found is None else found

    def expert_bias(self, layer: int, expert: int):
        return self.checkpoint.expert_bias(layer, expert)


class Measured:
    """A measuring pass over a golden checkpoint, and what it must have found."""

    def __init__(self, config, weights, sequences=8, tokens=128, domains=1, workers=1, files=None):
        self.config, self.weights = config, weights
        self.ids = np.random.default_rng(2).integers(0, config.vocab, (sequences, tokens))
        self.domains = np.arange(sequences) % domains
        calibration = Calibration(self.ids, "", self.domains, self.ids[:0], "")
        made = []

        def new_stream(name: str, rows: int, dim: int = 0) -> Stream:
            made.append(Stream(rows, dim or config.width, files / f"{len(made)}-{name}" if files else None))
            return made[-1]

        pass_ = Sensitivity(config, weights, calibration, CHOICES, CARRIED, workers, 1, new_stream)
        pass_.start()
        self.layers, self.after, self.told = [], [], []
        for layer in range(config.layer_count):
            self.layers.append(pass_.layer(layer, self.told.append))
            self.after.append(pass_.streams["source"].read(0, self.ids.size))
        self.measures = pass_.finish(self.layers, 100)
        self.gain = self.measures.gain
        pass_.close()

    def attended(self, layer: int) -> np.ndarray:
        """The residual stream before the layer's experts, (rows, dim)."""
        x = reference.embed(self.config, self.weights, self.ids)
        for before in range(layer):
            x = reference.layer(self.config, self.weights, before, x)
        return (x + reference.attention_block(self.config, self.weights, layer, x)).reshape(-1, self.config.dim)

    def rows_of(self, layer: int, expert: int, a: np.ndarray):
        """Normed inputs of the rows that chose the expert, their routing weights, their numbers."""
        h = reference.mlp_input(self.config, self.weights, layer, a)
        routed = reference.router_input(self.config, self.weights, layer, a)
        chosen, weight = reference.route(self.config, self.weights, layer, routed)
        rows, place = np.nonzero(chosen == expert)
        return h[rows], weight[rows, place], rows

    def rounded(self, layer: int, expert: int, a: np.ndarray, choice: tuple[int, int]) -> list[np.ndarray]:
        """The expert's matrices, each rounded for every second of its rows."""
        matrices = self.weights.expert(layer, expert)
        h, weight, rows = self.rows_of(layer, expert, a)
        counts = (weight**2 / np.square(self.after[layer][rows]).sum(1))[::2]
        found = []
        bias = reference.expert_bias(self.config, self.weights, layer, expert)
        inner = reference.expert_inner(self.config, h, *matrices[:2], bias=bias)
        for matrix, x in zip(matrices, (h, h, inner), strict=True):
            x = x[::2]
            moment = np.einsum("r,ri,rj->ij", counts / counts.sum(), x, x)
            packed = gptq(matrix, Curvature.of(moment, damping_for(*x.shape)), *choice, sweeps=0)
            found.append(dequantise(packed, choice[0], matrix.shape[1]))
        return found


@pytest.fixture(scope="module")
def measured(golden):
    """measured("olmoe", domains=2) is that pass, made once."""
    made = {}

    def make(name: str, **options) -> Measured:
        key = (name, *sorted(options.items()))
        if key not in made:
            checkpoint = Checkpoint(golden[name][0])
            made[key] = Measured(checkpoint.config, checkpoint, **options)
        return made[key]

    return make


def same_bits(a: LayerMeasure, b: LayerMeasure) -> None:
    for field in fields(LayerMeasure):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma4_text", "gpt_oss", "phimoe"])
def test_the_pass_computes_what_the_model_does_and_counts_its_experts(measured, architecture):
    m = measured(architecture)
    c, want = m.config, reference.embed(m.config, m.weights, m.ids)
    for layer, measure in enumerate(m.layers):
        want = reference.layer(c, m.weights, layer, want)
        np.testing.assert_allclose(m.after[layer], want.reshape(-1, c.dim), rtol=1e-5, atol=1e-4)
        assert (measure is None) == (layer in c.dense_layers)
        if measure is None:
            continue
        counts = [len(m.rows_of(layer, expert, m.attended(layer))[2]) for expert in range(c.experts)]
        assert measure.rows.tolist() == counts
        assert measure.frequency.sum() == pytest.approx(c.top_k)
        most = c.top_k if c.router.score == "sigmoid" else 1  # that a token's scores add up to
        assert 0 < measure.routing_weight.sum() <= most + 1e-6
    assert m.told == list(range(1, c.experts + 1)) * len(c.moe_layers)


@pytest.mark.parametrize("architecture", ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss"])
def test_errors_are_those_of_a_direct_computation(measured, architecture):
    """Rounded for every second row, the change of the output on the others; only one matrix is rounded at a time."""
    m = measured(architecture, domains=2)
    c, layer, tokens = m.config, m.config.moe_layers[-1], m.ids.shape[1]
    a, expert = m.attended(layer), int(np.argmax(m.layers[layer].rows))
    h, weight, rows = m.rows_of(layer, expert, a)
    assert len(rows) >= LEAST_ROWS  # so that no others are taken in
    matrices, others = m.weights.expert(layer, expert), slice(1, None, 2)
    bias = reference.expert_bias(c, m.weights, layer, expert)
    full = reference.expert(c, h, *matrices, bias=bias).astype(np.float64)
    domain = np.repeat(m.domains, tokens)[rows[others]]
    scale = len(rows) / len(rows[others])
    relative = 1 / np.square(m.after[layer][rows[others]], dtype=np.float64).sum(1)

    def errors_of(change: np.ndarray):
        squared = np.square(change).sum(1) * weight[others] ** 2
        in_domain = np.bincount(domain, squared * relative, 2) * scale / (tokens * np.bincount(m.domains))
        unseen = (squared * relative).mean() * c.top_k / c.experts
        return np.sqrt(squared.sum() * scale), [*in_domain, unseen]

    for i, choice in enumerate(CHOICES):
        rounded = m.rounded(layer, expert, a, choice)
        for part in range(3):
            mixed = [rounded[j] if j == part else matrices[j] for j in range(3)]
            norm, errors = errors_of((reference.expert(c, h, *mixed, bias=bias) - full)[others])
            np.testing.assert_allclose(m.layers[layer].norm_errors[expert, part, i], norm, rtol=0.01)
            np.testing.assert_allclose(m.layers[layer].errors[expert, part, i], errors, rtol=0.02)
    np.testing.assert_allclose(m.layers[layer].drop_errors[expert], errors_of(full[others])[1], rtol=1e-3)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_a_gain_is_the_divergence_that_a_layers_error_makes(measured, architecture):
    """With one kind of text and all of it sampled, gain times error is the mean KL divergence itself."""
    m = measured(architecture)
    c, everything = m.config, m.ids.reshape(-1)
    clean = log_softmax(reference.forward(c, m.weights, m.ids).reshape(len(everything), -1))
    for layer in c.moe_layers:
        a = m.attended(layer)
        rounded = {(layer, e): m.rounded(layer, e, a, CHOICES[CARRIED]) for e in range(c.experts)}
        moved = log_softmax(reference.forward(c, Changed(m.weights, rounded), m.ids).reshape(len(everything), -1))
        kl = (np.exp(clean) * (clean - moved)).sum(1).mean()
        # Sums over many rows in float32, whose routing may differ where two scores are as good as equal.
        assert m.gain[layer, 0] * m.layers[layer].carried[0] == pytest.approx(kl, rel=0.05)
        assert m.gain[layer, 1] == pytest.approx(m.gain[layer, 0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gains_are_positive_and_more_bits_cost_less(measured, architecture):
    m = measured(architecture, domains=2)
    for layer, (measure, gain) in enumerate(zip(m.layers, m.gain, strict=True)):
        assert (gain > 0).all() == (gain != 0).all() == (layer in m.config.moe_layers)
        if measure is not None:
            assert (np.diff(measure.errors, axis=2) < 0).all()
            assert (np.diff(measure.norm_errors, axis=2) < 0).all()
    cost = m.measures.cost()
    assert cost.shape == (m.config.expert_count, 3, len(CHOICES), 3)
    np.testing.assert_allclose(cost[0], m.layers[m.config.moe_layers[0]].errors[0] * m.gain[m.config.moe_layers[0]])


@pytest.mark.parametrize("architecture", ["qwen2_moe", "mixtral"])
def test_workers_and_files_do_not_change_the_result(measured, architecture, tmp_path):
    (tmp_path / "scratch").mkdir()
    one = measured(architecture, domains=2)
    for options in ({"workers": 2}, {"workers": 3, "files": tmp_path / "scratch"}):
        other = Measured(one.config, one.weights, domains=2, **options)
        for before, after in zip(one.layers, other.layers, strict=True):
            assert (before is None) == (after is None)
            if before is not None:
                same_bits(before, after)
        np.testing.assert_array_equal(one.gain, other.gain)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("against", [0.05, 4.0])  # at which its score is small, or zero in float32
def test_an_expert_that_is_hardly_or_never_used_has_finite_costs(golden, against):
    checkpoint = Checkpoint(golden["qwen3_moe"][0])
    embedding, router = checkpoint.trunk("embedding") + 4, checkpoint.trunk("layers.0.router")
    router[2] = -against  # all hidden states point the other way
    embedding[7] -= 8  # but those of this token
    m = Measured(checkpoint.config, Changed(checkpoint, {"embedding": embedding, "layers.0.router": router}))
    measure = m.layers[0]
    assert 0 < measure.rows[2] < LEAST_ROWS
    embedding[7] += 8
    never = Measured(checkpoint.config, Changed(checkpoint, {"embedding": embedding, "layers.0.router": router}))
    nothing = never.layers[0]
    assert nothing.rows[2] == nothing.frequency[2] == nothing.routing_weight[2] == 0
    assert not nothing.errors[2, :, :, :-1].any()
    assert not nothing.drop_errors[2, :-1].any()
    for pass_ in (m, never):
        for field in fields(LayerMeasure):
            assert np.isfinite(getattr(pass_.layers[0], field.name)).all()
        assert np.isfinite(pass_.gain).all()
        assert np.isfinite(pass_.measures.spread(0))
    counted = [measure, nothing] if against < 1 else [measure]
    for its in counted:  # text unlike calibration's would use it
        assert (its.errors[2, :, :, -1] > 0).all()
        assert (np.diff(its.errors[2, :, :, -1], axis=1) < 0).all()


# ---- what is done with measures


def test_measures_of_the_experts_that_are_kept(measured):
    m = measured("qwen3_moe")
    kept = ((0, 2, 5), (1, 2, 3, 4, 5))
    few = m.measures.of(replace(m.config, kept=kept))
    for layer in (0, 1):
        np.testing.assert_array_equal(few.layers[layer].errors, m.layers[layer].errors[list(kept[layer])])
        np.testing.assert_array_equal(few.layers[layer].rows, m.layers[layer].rows[list(kept[layer])])
        np.testing.assert_array_equal(few.layers[layer].carried, m.layers[layer].carried)
    np.testing.assert_array_equal(few.cost(), m.measures.cost()[[0, 2, 5, 7, 8, 9, 10, 11]])
    assert few.frequencies() == {
        (layer, i): m.layers[layer].frequency[expert] for layer in (0, 1) for i, expert in enumerate(kept[layer])
    }


def test_the_spread_is_the_90th_percentile_over_the_10th(measured):
    m = measured("qwen3_moe").measures
    cost = sorted(m.cost()[:, :, 1, 0].sum(axis=1))  # 12 experts: places 1.1 and 9.9 of 0..11
    low, high = 0.9 * cost[1] + 0.1 * cost[2], 0.1 * cost[9] + 0.9 * cost[10]
    assert m.spread(1) == pytest.approx(high / low)


@pytest.mark.parametrize("dense", [False, True])
def test_a_saved_measure_is_loaded_as_it_was(measured, tmp_path, dense):
    m = measured("qwen2_moe").layers[1 if dense else 0]
    save_measure(tmp_path / "measure.npz", m)
    assert [file.name for file in tmp_path.iterdir()] == ["measure.npz"]
    loaded = load_measure(tmp_path / "measure.npz")
    assert (loaded is None) == dense
    if not dense:
        same_bits(loaded, m)
