"""What rounding inputs costs: the bench rounds as the engine does, and the second plane of codes is worth its name."""

import numpy as np
import pytest
from bundles import REFERENCE

from bench.laboratory.input_precision import Weights, as_kernels_do, as_they_are, precision, rounded, to_int8
from edge_moe.compressor.rounding.bundle_weights import BundleWeights
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.runtime import Runtime


def test_inputs_are_rounded_in_blocks_of_their_own():
    x = np.random.default_rng(0).uniform(-1, 1, (3, 2, 100)).astype(np.float32)
    x[1, 1, 70] = 100
    step = np.abs(x[1, 1, 64:]).max() / 127
    for lows, most in ((False, step / 2), (True, step / 256)):
        error = np.abs(rounded(x, lows) - x)
        assert most / 4 < error[1, 1, 64:].max() <= most * 1.0001
        assert np.delete(error.reshape(6, 100), 3, 0).max() <= 1 / 127 / 2 * 1.0001


def test_products_alone_round_their_inputs():
    weights = Weights(Checkpoint(REFERENCE))
    ids = np.arange(20, 52)
    exact = reference.forward(weights.config, Checkpoint(REFERENCE), ids)
    assert np.array_equal(reference.forward(weights.config, weights, ids), exact)
    seen = []
    weights.inputs = lambda x: seen.append(x.shape[-1]) or as_they_are(x)
    reference.forward(weights.config, weights, ids)
    config = weights.config
    assert {config.dim, config.attention.heads * config.attention.head_dim, config.expert_hidden} == set(seen)
    # four projections of attention and three of each expert used, in every layer, and the head
    assert 4 * config.layer_count < len(seen) <= (4 + 3 * config.experts) * config.layer_count + 1


def test_float_inputs_cost_nothing_and_rounded_ones_little_beside_weights(tmp_path, bundle_of):
    text = tmp_path / "text.txt"
    text.write_text("def forward(self, x):\n    return self.layers(x) + x\n" * 20)
    packed = BundleWeights(Bundle.open(bundle_of("reference", width=4)))
    found = precision(REFERENCE, [text], [(4.5, packed)], 128)
    kld = {(bits, kind): score["kld_mean"] for bits, kind, score in found}
    assert kld[16, "float32"] == pytest.approx(0, abs=1e-9)
    assert 0 < kld[16, "as it runs"] < 1e-3 and 0 < kld[16, "int8"] < 1e-3  # 1e-4, mostly by a few choices of experts
    assert kld[4.5, "float32"] > 10 * kld[16, "as it runs"]
    assert kld[4.5, "as it runs"] == pytest.approx(kld[4.5, "float32"], rel=0.1)


def test_the_engine_rounds_as_the_bench_does(bundle_of):
    ids = np.arange(30, 94)
    with Runtime(bundle_of("reference", width=8), kv="float32") as runtime:
        got = runtime.logits(ids)
        weights = Weights(BundleWeights(runtime.bundle))
    errors = {}
    for kind, inputs in (("int8", to_int8), ("planes", as_kernels_do)):
        weights.inputs = inputs
        errors[kind] = np.median(np.abs(reference.forward(weights.config, weights, ids) - got))
    # The engine adds floats in another order, so some codes round to a neighbour: half of the error of one plane
    # everywhere.
    assert errors["planes"] < 0.75 * errors["int8"]
