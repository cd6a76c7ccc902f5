"""Mamba-2 and experts without a gate: the recurrence, records of two matrices, and every spelling of Nemotron-H."""

import json
import shutil

import numpy as np
import pytest
from bundles import assert_logits_of_transformers, same_bits, weights_of
from golden_checkpoints import write_checkpoint
from quantised_checkpoints import write_fp8, write_nvfp4, write_plain
from test_checkpoint import assert_same_tensors, read_file, write_file
from test_delta_net import SIZES, head

from edge_moe import _core
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config_file import parse_config
from edge_moe.runtime.layers.mamba import scan

PATTERN = "ME*-EM"  # of the golden checkpoint


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", _core.kernel_names())
def test_the_recurrence_is_the_reference_s_in_every_kernel_set_and_split(name, sizes):
    q, k, v, step, decay, state = head(*sizes)
    want = scan(*(x[None, :, None].astype(np.float64) for x in (q, k, v, step, decay)))[0, :, 0]
    got, after = _core.delta_rule(name, q, k, v, step, decay, state[:0], replaces=False)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())
    assert same_bits(after, _core.delta_rule("scalar", q, k, v, step, decay, state[:0], replaces=False)[1])
    whole, parts, at = _core.delta_rule("scalar", q, k, v, step, decay, state, replaces=False), [], state
    for t in range(len(q)):
        one = slice(t, t + 1)
        part, at = _core.delta_rule(name, q[one], k[one], v[one], step[one], decay[one], at, replaces=False)
        parts.append(part)
    assert same_bits(np.concatenate(parts), whole[0]) and same_bits(at, whole[1])


@pytest.mark.parametrize("name", _core.kernel_names())
def test_the_convolution_s_bias_is_added_before_silu(name):
    x, weights, bias = (
        np.random.default_rng(i).standard_normal(n, np.float32) for i, n in enumerate([(9, 37), (4, 37), 37])
    )
    none = np.zeros((0, 37), np.float32)
    linear, _ = _core.convolve(name, x, weights, none, 0, 37, silu=False)
    biased, _ = _core.convolve(name, x, weights, none, 0, 37, silu=False, bias=bias)
    assert same_bits(biased, linear + bias)
    got, _ = _core.convolve(name, x, weights, none, 0, 37, bias=bias)
    np.testing.assert_allclose(got, biased / (1 + np.exp(-biased.astype(np.float64))), rtol=2e-6, atol=1e-7)


def test_a_record_has_no_bytes_of_a_gate(mixed):
    bundle = Bundle.open(mixed("nemotron_h"))
    config = bundle.config
    assert config.expert_shapes == ((0, 64), (32, 64), (64, 32)) and config.expert_weights == 2 * 32 * 64
    for expert in bundle.experts.values():
        parts = bundle.layouts[expert.layout].parts
        assert {name.partition(".")[0] for name in parts} == {"up", "down"}
        assert min(parts.values())[0] == 0
        sizes = [
            32 * 64 * width // 8 + 2 * 2 * 32 * 64 // encoding.group
            for encoding in expert.encodings[1:]
            for width in [encoding.width]
        ]
        assert sum(nbytes for _, nbytes in parts.values()) == sum(sizes)
    with_gate = _core.RecordLayout(64, 32, bundle.layouts[0].encodings)
    layouts, *_ = bundle.record_table()
    assert layouts[0].bytes < with_gate.bytes
    assert [matrix.shape for matrix in weights_of(bundle.path).expert(1, 0)] == [(0, 64), (32, 64), (64, 32)]


@pytest.fixture
def source(tmp_path):
    return write_checkpoint("nemotron_h", tmp_path / "source")[0]


def test_the_names_and_keys_before_and_after_transformers_5_mean_the_same(source, golden, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = read_file(source / "model.safetensors")
    assert all(key.startswith(("backbone.", "lm_head.")) for key in tensors)
    write_file(other / "model.safetensors", {key.replace("backbone.", "model."): its for key, its in tensors.items()})
    raw = json.loads((source / "config.json").read_text())
    kinds = raw.pop("layers_block_type")
    raw |= {"hybrid_override_pattern": PATTERN, "num_hidden_layers": 6}
    raw["mamba_n_groups"], raw["mamba_d_conv"] = raw.pop("n_groups"), raw.pop("conv_kernel")
    (other / "config.json").write_text(json.dumps(raw))
    ours, theirs = Checkpoint(source), Checkpoint(other)
    assert ours.config == theirs.config
    assert_same_tensors(ours, theirs)
    assert kinds == ["linear_attention", "moe", "full_attention", "mlp", "moe", "linear_attention"]
    old = [{"linear_attention": "mamba", "full_attention": "attention"}.get(kind, kind) for kind in kinds]
    assert parse_config({**raw, "layers_block_type": old}) == ours.config


@pytest.mark.parametrize("write", [write_fp8, write_nvfp4])
def test_quantised_sources_are_read(source, tmp_path, write):
    options = {"method": "modelopt"} if write is write_nvfp4 else {"block": None}
    values = write(source, tmp_path / "quantised", **options)
    assert any("experts" in key for key in values) and any("in_proj" in key for key in values)
    write_plain(source, tmp_path / "plain", values, "F32")
    assert_same_tensors(Checkpoint(tmp_path / "quantised"), Checkpoint(tmp_path / "plain"))


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_block_type": ["moe", "full_attention", "linear_attention"], "use_conv_bias": False, "n_group": 1},
        {"layers_block_type": ["full_attention", "moe", "moe"], "time_step_min": 0.001, "norm_topk_prob": False},
        {
            "layers_block_type": ["mlp", "mlp", "full_attention", "linear_attention", "moe"],
            "mamba_num_heads": 4,
            "n_groups": 4,
        },
    ],
)
def test_any_order_of_layers_gives_the_logits_of_transformers(tmp_path, changes):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import random_model

    random_model("nemotron_h", seed=len(changes["layers_block_type"]), **changes).save_pretrained(tmp_path)
    assert_logits_of_transformers(tmp_path)
