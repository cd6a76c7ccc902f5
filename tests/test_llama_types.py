"""llama.cpp's types as rows of the quality report: its own quantiser, and the importance that it is given."""

import numpy as np
import pytest
from bundles import REFERENCE

from bench.laboratory.quality import llama_types
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference


@pytest.mark.parametrize("cols", [256, 192, 576])
def test_llama_cpps_types_are_its_own_and_heed_importance(cols):
    pytest.importorskip("llama_cpp")
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    rng = np.random.default_rng(0)
    weights, importance = rng.standard_normal((64, cols)).astype(np.float32), np.ones(cols, np.float32)
    plain = quants.dequantize(quants.quantize(weights, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    errors = {name: np.square(llama_types.Quantiser(name)(weights, importance) - weights) for name in llama_types.TYPES}
    assert errors["Q4_0"].mean() < np.square(plain - weights).mean()  # which has no search for scales
    for narrow, wide in (("IQ2_XXS", "IQ2_S"), ("IQ2_S", "IQ3_XXS"), ("IQ3_XXS", "IQ3_S"), ("IQ3_S", "Q4_K")):
        assert errors[narrow].mean() > 1.1 * errors[wide].mean()
    importance[::2] = 100
    heeding = np.square(llama_types.Quantiser("IQ3_S")(weights, importance) - weights)
    assert heeding[:, ::2].mean() < 0.9 * errors["IQ3_S"][:, ::2].mean()


def test_importance_is_the_mean_square_of_what_an_expert_is_given():
    with Checkpoint(REFERENCE) as checkpoint:
        config, ids = checkpoint.config, np.random.default_rng(0).integers(0, checkpoint.config.vocab, (2, 64))
        found = llama_types.mean_squares(config, checkpoint, ids)
        x = reference.embed(config, checkpoint, ids)
        for layer in range(config.layer_count - 1):
            x = reference.layer(config, checkpoint, layer, x)
        layer = config.layer_count - 1
        x = x + reference.attention_block(config, checkpoint, layer, x)
        h = reference.mlp_input(config, checkpoint, layer, x)
        chosen, _ = reference.route(config, checkpoint, layer, h)
        expert = int(np.bincount(chosen.reshape(-1)).argmax())
        its = h[(chosen == expert).any(axis=1)]
        inner = reference.expert_inner(config, its, *checkpoint.expert(layer, expert)[:2])
    assert len(found) == config.expert_count
    for one, wanted in zip(found[layer, expert], (its, inner), strict=True):
        np.testing.assert_allclose(one, np.square(wanted).mean(axis=0), rtol=1e-3)
