"""Rotary position: angles and scales are those of transformers, and turning a vector does what it should."""

import math
from dataclasses import replace

import numpy as np
import pytest
from bundles import REFERENCE

from edge_moe.runtime import reference
from edge_moe.runtime.config import ModelConfig, YarnScaling, load_config, parse_config, read_json
from edge_moe.runtime.rope import rope_frequency, rope_scale, softmax_scale

DEEPSEEK = parse_config(read_json(REFERENCE.parent / "configs" / "deepseek-v3.json"))


def transformers_rope(config: ModelConfig, yarn: dict) -> tuple[np.ndarray, float, float]:
    """Frequencies, what cos and sin are multiplied by, and the scale of the softmax."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    raw = transformers.AutoConfig.for_model(
        "deepseek_v3",
        hidden_size=64,
        num_attention_heads=2,
        qk_rope_head_dim=config.rope_dim,
        qk_nope_head_dim=config.head_dim - config.rope_dim,
        max_position_embeddings=config.context,
        rope_parameters={"rope_theta": config.rope_theta, **yarn},
    )
    rotary = DeepseekV3RotaryEmbedding(raw)
    return rotary.inv_freq.numpy(), rotary.attention_scaling, DeepseekV3Attention(raw, 0).scaling


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mscale": 0.0, "mscale_all_dim": 0.0},
        {"mscale": 0.7, "mscale_all_dim": 0.0},
        {"mscale": 0.0, "mscale_all_dim": 0.7},
        {"mscale": 1.3, "mscale_all_dim": 0.7},
        {"factor": 0.5},
        {"factor": 3.0, "original_context": 1000},
        {"beta_fast": 8.0, "beta_slow": 4.0},
        {"original_context": 20},
        {"beta_fast": 1.0, "beta_slow": 1.0, "original_context": 7},
    ],
)
@pytest.mark.parametrize("theta", [1e4, 50.0])
def test_yarn_is_that_of_transformers(change, theta):
    yarn = replace(DEEPSEEK.yarn, **change)
    config = replace(DEEPSEEK, yarn=yarn, rope_theta=theta)
    given = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        **({"mscale": yarn.mscale} if yarn.mscale else {}),
        **({"mscale_all_dim": yarn.mscale_all_dim} if yarn.mscale_all_dim else {}),
    }
    frequency, scale, softmax = transformers_rope(config, given)
    assert rope_frequency(config).dtype == np.float32
    np.testing.assert_allclose(rope_frequency(config), frequency, rtol=3e-7)
    assert rope_scale(config) == pytest.approx(scale, rel=1e-12)
    assert softmax_scale(config) == pytest.approx(softmax, rel=1e-12)


@pytest.mark.parametrize("theta", [1e4, 1e6, 50.0])
def test_without_yarn_angles_are_those_of_transformers(theta):
    config = replace(DEEPSEEK, yarn=None, rope_theta=theta)
    frequency, scale, softmax = transformers_rope(config, {"rope_type": "default"})
    np.testing.assert_allclose(rope_frequency(config), frequency, rtol=2e-7)
    assert (rope_scale(config), softmax_scale(config)) == (scale, softmax) == (1.0, 192**-0.5)


def test_deepseek_v3_turns_fast_pairs_as_before_and_slow_ones_forty_times_slower():
    slowed = rope_frequency(replace(DEEPSEEK, yarn=None)) / rope_frequency(DEEPSEEK)
    # 4,096 tokens are 32 turns of pair 10.47 and one of pair 22.51.
    np.testing.assert_allclose(slowed[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(slowed[23:], 40, rtol=1e-6)
    assert (np.diff(slowed[10:24]) > 0).all()
    assert rope_scale(DEEPSEEK) == 1.0
    assert softmax_scale(DEEPSEEK) == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_linear_scaling_divides_every_angle():
    config = load_config(REFERENCE)
    plain = rope_frequency(config)
    assert plain.shape == (config.head_dim // 2,)
    np.testing.assert_array_equal(rope_frequency(replace(config, rope_factor=4.0)), plain / 4)
    np.testing.assert_allclose(plain, config.rope_theta ** (-np.arange(len(plain)) / len(plain)), rtol=2e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_depends_on_distance_alone(interleaved):
    yarn = YarnScaling(4.0, 64, 32.0, 1.0, 1.0, 1.0)
    config = replace(DEEPSEEK, yarn=yarn, latent=replace(DEEPSEEK.latent, rope_dim=16))
    cos, sin = reference.rope_tables(config, 40)
    q, k = np.random.default_rng(0).standard_normal((2, 16), dtype=np.float32)
    q, k = (reference.rotate(np.tile(x, (1, 40, 1, 1)), cos, sin, interleaved=interleaved)[0, :, 0] for x in (q, k))
    products = q @ k.T
    for distance in (0, 1, 17):
        np.testing.assert_allclose(np.diagonal(products, -distance), products[distance, 0], atol=1e-5)
    assert abs(products[17, 0] - products[0, 0]) > 1e-2


def test_interleaved_pairs_are_neighbours():
    cos, sin = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)  # a quarter turn: (a, b) to (-b, a)
    x = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)
    assert reference.rotate(x, cos, sin).ravel().tolist() == [-3, -4, 1, 2]
    assert reference.rotate(x, cos, sin, interleaved=True).ravel().tolist() == [-2, -4, 1, 3]
