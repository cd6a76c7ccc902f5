"""Rotary position: angles and scales are those of transformers, and turning a vector does what it should."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from bundles import REFERENCE, changed, make_engine, run_engine, same_bits, write_lossless

from edge_moe.bench.evaluate import checkpoint_logits
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.config_file import load_config, parse_config, read_json
from edge_moe.runtime.config_keys import Keys
from edge_moe.runtime.layers.latent import LatentAttention
from edge_moe.runtime.layers.rope import LongRope, Rope, Stretch, YarnScaling, rotate
from edge_moe.runtime.rope_config import read_rope

RAW = read_json(REFERENCE.parent / "configs" / "deepseek-v3.json")
DEEPSEEK = parse_config(RAW).attention


def transformers_rope(attention: LatentAttention, rope: dict) -> tuple[np.ndarray, float, float]:
    """Frequencies, what cos and sin are multiplied by, and the scale of the softmax."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    raw = transformers.AutoConfig.for_model(
        "deepseek_v3",
        hidden_size=64,
        num_attention_heads=2,
        qk_rope_head_dim=attention.rope.dim,
        qk_nope_head_dim=attention.nope_dim,
        max_position_embeddings=RAW["max_position_embeddings"],
        rope_parameters=rope,
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
        {"truncate": False},
        {"truncate": False, "beta_fast": 8.0, "beta_slow": 4.0},
        {"truncate": False, "original_context": 20},
        {"original_context": 20},
        {"beta_fast": 1.0, "beta_slow": 1.0, "original_context": 7},
    ],
)
@pytest.mark.parametrize("theta", [1e4, 50.0])
def test_yarn_is_that_of_transformers(change, theta):
    yarn = replace(DEEPSEEK.rope.yarn, **change)
    given = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
        **({"mscale": yarn.mscale} if yarn.mscale else {}),
        **({"mscale_all_dim": yarn.mscale_all_dim} if yarn.mscale_all_dim else {}),
    }
    attention = with_rope(given)
    frequency, scale, softmax = transformers_rope(attention, given)
    assert attention.rope.frequency().dtype == np.float32
    np.testing.assert_allclose(attention.rope.frequency(), frequency, rtol=3e-7)
    assert attention.rope.scale == pytest.approx(scale, rel=1e-12)
    assert attention.softmax_scale == pytest.approx(softmax, rel=1e-12)


def with_rope(rope: dict) -> LatentAttention:
    """DeepSeek-V3's attention with another rotary position."""
    raw = {key: value for key, value in RAW.items() if key not in ("rope_scaling", "rope_theta")}
    return parse_config({**raw, "rope_parameters": rope}).attention


@pytest.mark.parametrize("theta", [1e4, 1e6, 50.0])
def test_without_yarn_angles_are_those_of_transformers(theta):
    rope = {"rope_type": "default", "rope_theta": theta}
    attention = with_rope(rope)
    frequency, scale, softmax = transformers_rope(attention, rope)
    np.testing.assert_allclose(attention.rope.frequency(), frequency, rtol=2e-7)
    assert (attention.rope.scale, attention.softmax_scale) == (scale, softmax) == (1.0, 192**-0.5)


def test_deepseek_v3_turns_fast_pairs_as_before_and_slow_ones_forty_times_slower():
    rope = DEEPSEEK.rope
    slowed = replace(rope, yarn=None).frequency() / rope.frequency()
    # 4,096 tokens are 32 turns of pair 10.47 and one of pair 22.51.
    np.testing.assert_allclose(slowed[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(slowed[23:], 40, rtol=1e-6)
    assert (np.diff(slowed[10:24]) > 0).all()
    assert rope.scale == 1.0
    assert DEEPSEEK.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize("share, factor", [(0.25, 1.0), (1.0, 1.0), (0.3, 2.5)])
def test_proportional_angles_are_those_of_transformers(share, factor):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "proportional", "rope_theta": 5000.0, "partial_rotary_factor": share, "factor": factor}
    raw = transformers.AutoConfig.for_model("qwen3_moe", head_dim=48, rope_parameters=rope)
    want, scale = ROPE_INIT_FUNCTIONS["proportional"](raw, None)
    got = read_rope(Keys({"rope_parameters": rope}, "config.json"), 48, types=("proportional",))
    assert got.span == 48 and scale == got.scale == 1
    frequency = np.zeros(24, np.float32)
    frequency[: got.dim // 2] = got.frequency()
    np.testing.assert_allclose(frequency, want.numpy(), rtol=3e-7)
    cos, sin = got.tables(3)
    assert np.all(cos[:, got.dim // 2 :] == 1) and np.all(sin[:, got.dim // 2 :] == 0)


LONG = LongRope(
    64,
    Stretch((1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5, 3.0), 1.2),
    Stretch((1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0), 1.4),
)


@pytest.mark.parametrize("context", [1, 64, 65, 256])
@pytest.mark.parametrize("theta", [1e4, 50.0])
def test_longrope_is_that_of_transformers(context, theta):
    """Frequencies by its function of them, as its phimoe 5.24 asks for those of a short context alone."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    raw = transformers.AutoConfig.for_model(
        "phimoe",
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": theta,
            "original_max_position_embeddings": LONG.original_context,
            "short_factor": list(LONG.short.factors),
            "long_factor": list(LONG.long.factors),
            "short_mscale": LONG.short.scale,
            "long_mscale": LONG.long.scale,
        },
    )
    frequency, _ = ROPE_INIT_FUNCTIONS["longrope"](raw, seq_len=context)
    cos, _ = PhimoeRotaryEmbedding(raw)(torch.zeros(1), torch.arange(context)[None])
    rope = Rope(16, theta, long=LONG)
    planned = rope.planned(context)
    np.testing.assert_allclose(planned.frequency(), frequency, rtol=3e-7)
    assert planned.frequency().dtype == np.float32
    assert planned.scale == pytest.approx(cos[0, 0, 0].item(), rel=1e-7)
    for own, plans in zip(rope.tables(context), planned.tables(context), strict=True):
        np.testing.assert_array_equal(own, plans)


def test_a_run_takes_one_stretch_whatever_its_sequences_come_to_be(golden, tmp_path):
    """What a run of 65 tokens computes is the model whose only stretch is the long one, from the first token on."""
    directory, ids, want = golden["phimoe"]
    checkpoint = Checkpoint(directory)
    config, only_long = checkpoint.config, changed(checkpoint.config, rope={"long": {"short": LONG.long}})
    assert config.attention.rope.long == LONG
    path = write_lossless(tmp_path / "b.emoe", directory, config, checkpoint)
    short, long = (run_engine(make_engine(path, context=context), ids) for context in (64, 65))
    assert np.abs(short - want).max() <= 1e-4
    assert np.abs(long - want).max() > 0.1
    assert same_bits(long, run_engine(make_engine(path, context=64, config=only_long), ids))
    assert same_bits(long[:5], run_engine(make_engine(path, context=200), ids[:5], 2))
    for reference_config in (config.planned(65), only_long):
        assert np.abs(reference.forward(reference_config, checkpoint, ids) - long).max() <= 1e-4
    _, logits = checkpoint_logits(directory, context=65)
    assert np.abs(logits(ids) - long).max() <= 1e-4


def test_beyond_the_original_context_logits_are_those_of_transformers_with_the_long_stretch(golden, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import logits_of as transformers_logits

    directory = golden["phimoe"][0]
    checkpoint = Checkpoint(directory)
    path = write_lossless(tmp_path / "b.emoe", directory, checkpoint.config, checkpoint)
    raw = read_json(directory / "config.json")
    rope = raw["rope_parameters"]
    rope |= {"short_factor": rope["long_factor"], "short_mscale": rope["long_mscale"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    ids = np.random.default_rng(3).integers(0, raw["vocab_size"], 80)
    got, want = run_engine(make_engine(path, context=80), ids), transformers_logits(tmp_path, ids)
    assert np.abs(got - want).max() <= 1e-4
    assert np.array_equal(got.argmax(-1), want.argmax(-1))


def test_linear_scaling_divides_every_angle():
    attention = load_config(REFERENCE).attention
    rope = attention.rope
    plain = rope.frequency()
    assert plain.shape == (attention.head_dim // 2,)
    np.testing.assert_array_equal(replace(rope, factor=4.0).frequency(), plain / 4)
    np.testing.assert_allclose(plain, rope.theta ** (-np.arange(len(plain)) / len(plain)), rtol=2e-7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_depends_on_distance_alone(interleaved):
    yarn = YarnScaling(4.0, 64, 32.0, 1.0, 1.0, 1.0)
    cos, sin = Rope(16, 10_000.0, yarn=yarn).tables(40)
    q, k = np.random.default_rng(0).standard_normal((2, 16), dtype=np.float32)
    q, k = (rotate(np.tile(x, (1, 40, 1, 1)), cos, sin, interleaved=interleaved)[0, :, 0] for x in (q, k))
    products = q @ k.T
    for distance in (0, 1, 17):
        np.testing.assert_allclose(np.diagonal(products, -distance), products[distance, 0], atol=1e-5)
    assert abs(products[17, 0] - products[0, 0]) > 1e-2


def test_interleaved_pairs_are_neighbours():
    cos, sin = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)  # a quarter turn: (a, b) to (-b, a)
    x = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)
    assert rotate(x, cos, sin).ravel().tolist() == [-3, -4, 1, 2]
    assert rotate(x, cos, sin, interleaved=True).ravel().tolist() == [-2, -4, 1, 3]
