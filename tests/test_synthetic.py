"""Random bundles: any config's shapes, the same bytes for a seed, weights that behave."""

import hashlib
import json

import numpy as np
import pytest
from bundles import weights_of
from golden_checkpoints import ARCHITECTURES, write_checkpoint

from edge_moe import _core
from edge_moe.bench.bench import parameters
from edge_moe.bench.synthetic import _matrix, make_synthetic
from edge_moe.runtime.bundle import Bundle, verify
from edge_moe.runtime.runtime import Runtime

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 128,
    "eos_token_id": 7,
}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "config.json"


def contents(directory) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_the_same_seed_gives_the_same_bytes_and_another_others(config, tmp_path):
    first, second, other = (
        contents(make_synthetic(config, tmp_path / f"{name}.emoe", seed=seed).path)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == second
    assert first["config.json"] == other["config.json"]
    assert first["trunk.safetensors"] != other["trunk.safetensors"]
    assert first["experts-00001-of-00001.safetensors"] != other["experts-00001-of-00001.safetensors"]


@pytest.mark.parametrize("width", _core.WIDTHS)
def test_every_width_makes_a_whole_bundle_with_finite_logits(config, tmp_path, width):
    bundle = make_synthetic(config, tmp_path / "w.emoe", width=width)
    assert sum(count for _, count in verify(bundle)) == bundle.nbytes + sum(bundle.copies.values())
    with Runtime(bundle.path, ram="2GB", logits_rows=16) as runtime:
        logits = runtime.logits(range(16))
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100


def test_experts_of_mxfp4_have_the_usual_deviation(config, tmp_path):
    bundle = make_synthetic(config, tmp_path / "mxfp4.emoe", mxfp4=True)
    assert {its.codec for expert in bundle.experts.values() for its in expert.encodings} == {"mxfp4"}
    for matrix in weights_of(bundle.path).expert(1, 3):
        assert abs(matrix.mean()) < 0.02 * matrix.std()
        assert 0.7 < matrix.std() * matrix.shape[1] ** 0.5 < 1.42  # exponents are whole
    with Runtime(bundle.path, ram="2GB") as runtime:
        assert len(runtime.generate([1, 2, 3], 5).tokens) == 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_random_bundle(tmp_path, architecture):
    checkpoint = write_checkpoint(architecture, tmp_path / "checkpoint")[0]
    bundle = make_synthetic(checkpoint, tmp_path / "random.emoe", width=16)
    with Runtime(bundle.path, ram="2GB") as runtime:
        assert len(runtime.generate([1, 2, 3], 5).tokens) == 5


def test_layers_and_vocabulary_can_be_changed_and_there_is_no_end_token(config, tmp_path):
    bundle = make_synthetic(config.parent, tmp_path / "x.emoe", layers=2, vocab=64)
    assert (bundle.config.layer_count, bundle.config.vocab, bundle.config.eos_tokens) == (2, 64, ())
    per_layer = 2 * 4 * 32 * 128 + 2 * 2 * 32 * 128 + 2 * 32 + 2 * 128 + 8 * 128  # q and o, k and v, norms, router
    assert parameters(bundle) == 2 * per_layer + 128 + 2 * 64 * 128 + 2 * 8 * 3 * 64 * 128
    assert Bundle.open(bundle.path).config == bundle.config


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 8])
def test_weights_are_zero_mean_with_a_deviation_near_one_over_the_root_of_inputs(width):
    packed = _matrix(np.random.default_rng(0), (512, 1024), width, 64)
    weights = _core.dequantise("scalar", packed.codes.reshape(512, -1), packed.scales, packed.biases, width, 1024)
    assert abs(weights.mean()) < 5 * weights.std() / np.sqrt(weights.size)
    assert 0.7 < weights.std() * np.sqrt(1024) < 1.5  # the scale is rounded to a power of two


def test_experts_are_routed_to_evenly_enough_to_need_paging(config, tmp_path):
    bundle = make_synthetic(config, tmp_path / "even.emoe")
    with Runtime(bundle.path, ram="2GB", logits_rows=128) as runtime:
        rows = runtime.logits(np.random.default_rng(0).integers(0, 512, 128))
    assert len(set(rows.argmax(-1).tolist())) > 64  # tokens keep their own states


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": 0}, "num_hidden_layers is 0, expected at least 1"),
        ({"vocab": 1}, "vocab_size is 1, expected at least 2"),
        ({"width": 7}, "width is 7, expected one of 1, 2, 3, 4, 5, 6, 8, 16"),
    ],
)
def test_options_out_of_range_are_refused(config, tmp_path, change, message):
    with pytest.raises(ValueError) as error:
        make_synthetic(config, tmp_path / "x.emoe", **change)
    assert str(error.value) == message
    assert not (tmp_path / "x.emoe").exists() and not (tmp_path / "x.emoe.partial").exists()


def test_experts_that_cannot_be_grouped_need_width_16(config, tmp_path):
    config.write_text(json.dumps(CONFIG | {"moe_intermediate_size": 40}))
    with pytest.raises(ValueError, match="experts are 40 x 128, not multiples of 32; use width 16$"):
        make_synthetic(config, tmp_path / "x.emoe")
    make_synthetic(config, tmp_path / "x.emoe", width=16)
