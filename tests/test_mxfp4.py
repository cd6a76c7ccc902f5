"""MXFP4: experts are read as transformers reads them, kept without a loss, and run with kernels of their own."""

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import logits_of, make_engine, run_engine, same_bits, weights_of
from quantised_checkpoints import write_gpt_oss, write_mxfp4, write_plain
from test_checkpoint import read_file, refusal, write_file

from edge_moe import _core, compress
from edge_moe.compressor.choosing import allocate
from edge_moe.compressor.choosing.sensitivity import Measures
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import KEPT, record_bytes_of
from edge_moe.runtime import reference
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.runtime import Runtime

VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = np.concatenate([VALUES, -VALUES])
NONE = np.zeros((0, 0), np.uint16)


@pytest.fixture(scope="module")
def source(golden, tmp_path_factory) -> Path:
    """gpt-oss with random codes; plain/ beside it has their values as bfloat16."""
    directory = tmp_path_factory.mktemp("mxfp4")
    values = write_gpt_oss(golden["gpt_oss"][0], directory / "gpt_oss")
    write_plain(golden["gpt_oss"][0], directory / "plain", values, "BF16")
    return directory / "gpt_oss"


@pytest.fixture(scope="module")
def kept(source) -> Path:
    return compress(source, source.parent / "kept.emoe", method="keep").path


def bits_of(values) -> list[np.ndarray]:
    return [np.asarray(one, np.float32).view(np.uint32) for one in values]


# ---- the kernels


def random_matrix(rows: int, cols: int, seed: int = 0):
    """Codes (rows, cols / 2), exponents (rows, cols / 32) and the values that they stand for, float32."""
    random = np.random.default_rng(seed)
    codes, exponents = random.integers(0, 256, (rows, cols // 2)), random.integers(110, 131, (rows, cols // 32))
    exponents[0, 0], exponents[-1, -1] = 0, 1  # whose halves are subnormal
    values = VALUES[np.stack([codes & 15, codes >> 4], -1).reshape(rows, cols)]
    values = values * np.exp2(exponents.astype(np.float64) - 127).repeat(32, 1)
    return codes.astype(np.uint8), exponents.astype(np.uint8), values.astype(np.float32)


@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (7, 96), (33, 64), (50, 1056), (16, 2880)])
def test_products_are_near_numpy_and_equal_scalar(rows, cols):
    codes, exponents, values = random_matrix(rows, cols)
    for name in _core.kernel_names():
        found = _core.dequantise(name, codes, NONE, NONE, 4, cols, exponents)
        assert np.array_equal(found.view(np.uint32), values.view(np.uint32))  # the sign of each zero as well
    for tokens in (1, 2, 9, 70):
        x = np.random.default_rng(tokens).standard_normal((tokens, cols)).astype(np.float32)
        x[::3, :: cols // 2] *= 3000  # blocks with two planes
        x_codes, lows, _, scales, *_ = zip(*(_core.quantise_activations("scalar", row) for row in x), strict=True)
        rounded = (np.array(x_codes) + np.array(lows) / 256).reshape(tokens, -1, 64) * np.array(scales)[..., None]
        rounded = rounded.reshape(tokens, -1)[:, :cols]
        got = _core.matmul("scalar", codes, NONE, NONE, 4, x, exponents=exponents)
        # Two roundings of each group, of sums up to that of 24 half scales times each input, in either sign.
        half = np.exp2(exponents.astype(np.float64) - 128).repeat(32, 1)
        bound = cols / 16 * 2.0**-24 * (np.abs(rounded) @ (36 * half).T) + 1e-37  # of subnormal products
        assert (np.abs(got - rounded @ values.astype(np.float64).T) <= bound).all()
        for name in _core.kernel_names()[:-1]:
            its = _core.matmul(name, codes, NONE, NONE, 4, x, exponents=exponents)
            assert np.array_equal(its.view(np.uint32), got.view(np.uint32)), name


def test_what_is_no_mxfp4_matrix_is_refused():
    codes, exponents, _ = random_matrix(4, 64)
    with pytest.raises(ValueError, match="exponents must be of groups of 32"):
        _core.dequantise("scalar", codes, NONE, NONE, 4, 64, exponents[:, :1])
    with pytest.raises(ValueError, match="mxfp4 has width 4"):
        _core.dequantise("scalar", codes, NONE, NONE, 8, 32, exponents[:, :1])
    with pytest.raises(ValueError, match="the group of codec mxfp4 must be at most 32"):
        _core.RecordLayout(64, 64, [("mxfp4", 4, 64)] * 3)


# ---- the source


def test_gpt_oss_is_read_as_transformers_reads_it(source):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    checkpoint, tensors = Checkpoint(source), read_file(source / "model.safetensors")

    def theirs(key: str) -> np.ndarray:
        parts = []
        for part in ("blocks", "scales"):
            _, shape, data = tensors[f"model.layers.1.mlp.experts.{key}_{part}"]
            parts.append(torch.from_numpy(np.frombuffer(data, np.uint8).reshape(shape).copy()))
        return convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy()  # (experts, inputs, outputs)

    gate_up, down = theirs("gate_up_proj"), theirs("down_proj")
    for expert in range(checkpoint.config.experts):
        want = (gate_up[expert, :, 0::2].T, gate_up[expert, :, 1::2].T, down[expert].T)
        for got, its in zip(checkpoint.expert(1, expert), want, strict=True):
            np.testing.assert_array_equal(got, its)


def test_both_forms_of_gpt_oss_give_the_same_logits(source, golden):
    ids = golden["gpt_oss"][1]
    one, other = Checkpoint(source), Checkpoint(source.parent / "plain")
    assert one.dtype("layers.0.experts.2.up") == "MXFP4" and other.dtype("layers.0.experts.2.up") == "BF16"
    assert one.has_codes and not other.has_codes
    assert same_bits(reference.forward(one.config, one, ids), reference.forward(other.config, other, ids))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_checkpoint_of_codes_gives_the_logits_of_transformers(golden, tmp_path, seed):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from make_golden import logits_of as transformers_logits

    values = write_gpt_oss(golden["gpt_oss"][0], tmp_path / "codes", seed)
    write_plain(golden["gpt_oss"][0], tmp_path / "plain", values, "BF16")
    ids = np.random.default_rng(seed).integers(0, 128, 40)
    checkpoint = Checkpoint(tmp_path / "codes")
    got = reference.forward(checkpoint.config, checkpoint, ids)
    want = transformers_logits(tmp_path / "plain", ids)
    assert np.abs(got - want).max() <= 1e-4 and np.array_equal(got.argmax(-1), want.argmax(-1))


CHANGES = {
    "a scale that is missing": (
        lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"),
        "tensor model.layers.0.mlp.experts.down_proj_blocks is MXFP4 and its scales "
        "model.layers.0.mlp.experts.down_proj_scales are missing",
    ),
    "blocks of another size": (
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj_blocks": ("U8", [6, 96, 1, 8], bytes(6 * 96 * 8))}),
        r"down_proj_blocks has shape \(6, 96, 1, 8\), config.json makes it \(6, 96, 1, 16\)",
    ),
    "scales of another number": (
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj_scales": ("U8", [6, 96, 2], bytes(6 * 96 * 2))}),
        r"down_proj_scales has shape \(6, 96, 2\), expected \(6, 96, 1\), the scales of",
    ),
    "biases that are missing": (
        lambda t: t.pop("model.layers.1.mlp.experts.gate_up_proj_bias"),
        "tensor model.layers.1.mlp.experts.gate_up_proj_bias is missing",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_checkpoint_is_refused_by_tensor(source, tmp_path, change):
    damage, message = CHANGES[change]
    tensors = read_file(source / "model.safetensors")
    damage(tensors)
    write_file(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_an_exponent_beyond_what_products_hold_is_refused(source, tmp_path):
    key, tensors = "model.layers.1.mlp.experts.down_proj_scales", read_file(source / "model.safetensors")
    kind, shape, data = tensors[key]
    write_file(tmp_path / "model.safetensors", {**tensors, key: (kind, shape, data[:-1] + b"\xfd")})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert refusal(ValueError, lambda: compress(tmp_path, tmp_path / "x.emoe", method="keep")) == (
        f"{tmp_path}/model.safetensors: tensor {key} has the exponent 253, expected at most 252 (read for "
        "layers.1.experts.5.down); the checkpoint is damaged, download it again"
    )


# ---- the bundle


def test_what_is_kept_has_the_checkpoints_weights_to_the_last_bit(source, kept):
    checkpoint, made, bundle = Checkpoint(source), weights_of(kept), Bundle.open(kept)
    config = checkpoint.config
    for layer, expert in bundle.experts:
        for got, want in zip(
            bits_of(made.expert(layer, expert)), bits_of(checkpoint.expert(layer, expert)), strict=True
        ):
            np.testing.assert_array_equal(got, want)
        for got, want in zip(made.expert_bias(layer, expert), checkpoint.expert_bias(layer, expert), strict=True):
            np.testing.assert_array_equal(got, want)
    for name in checkpoint.trunk_names():
        np.testing.assert_array_equal(made.trunk(name), checkpoint.trunk(name))
    table = json.loads((kept / "bundle.json").read_text())
    assert table["method"] == {"name": "keep"}
    (layout,) = table["experts"]["layouts"]
    assert layout["matrices"] == [{"codec": "mxfp4", "width": 4, "group": 32}] * 3
    sizes = {name: nbytes for name, (_, nbytes) in layout["parts"].items()}
    matrix = config.dim * config.expert_hidden
    assert sizes["up.codes"] == matrix // 2 and sizes["up.scales"] == matrix // 32 and "up.biases" not in sizes
    assert layout["bytes"] == record_bytes_of(config, KEPT)


def test_experts_of_another_family_are_kept_as_well(golden, tmp_path):
    write_mxfp4(golden["qwen3_moe"][0], tmp_path / "codes")
    checkpoint = Checkpoint(tmp_path / "codes")
    made = weights_of(compress(tmp_path / "codes", tmp_path / "kept.emoe", method="keep", trunk_width=8).path)
    assert all(
        np.array_equal(got, want)
        for expert in range(6)
        for got, want in zip(bits_of(made.expert(1, expert)), bits_of(checkpoint.expert(1, expert)), strict=True)
    )


def test_a_bundle_of_codes_runs_alike_everywhere(kept, golden):
    ids, config = golden["gpt_oss"][1], Bundle.open(kept).config
    want, exact = run_engine(make_engine(kept), ids), reference.forward(config, weights_of(kept), ids)
    assert np.abs(want - exact).mean() < 0.03 * exact.std()  # inputs of products are rounded to 8 bits or 15
    for slots, chunk, threads in ((None, 7, 2), (config.top_k, 1, 1), (config.top_k + 1, 16, 2)):
        assert same_bits(run_engine(make_engine(kept, slots=slots, threads=threads), ids, chunk), want)
    for kernels in _core.kernel_names():
        assert same_bits(run_engine(make_engine(kept, kernels=kernels), ids), want)
    with Runtime(kept, context=64, kv="float32") as runtime:
        assert runtime.generate(ids[:8].tolist(), 8).experts_used == config.top_k
    assert np.array_equal(logits_of(kept, ids).argmax(-1), want.argmax(-1))


def test_keeping_takes_no_target_and_needs_codes(source, tmp_path):
    for options in ({"bits": 4.25}, {"width": 4}, {"size": "1GB"}, {"group": 32}):
        assert refusal(ValueError, lambda o=options: compress(source, tmp_path / "x.emoe", method="keep", **o)) == (
            "method keep takes no bits, width, size or group: experts stay as the checkpoint has them"
        )
    plain = source.parent / "plain"
    assert refusal(ValueError, lambda: compress(plain, tmp_path / "x.emoe", method="keep")) == (
        f"{plain}: method keep needs experts in MXFP4, or in MLX's affine mode with scales in bfloat16, all alike, "
        "which these are not; use bits 16"
    )


# ---- widths that are chosen


@pytest.mark.parametrize("bits", [5.0, 7.2])  # records of 4 KiB take 3.6, those of 8 KiB 7.1
def test_pmq_keeps_codes_where_that_is_worth_their_bytes(source, golden, tmp_path, bits):
    ids = np.random.default_rng(3).integers(0, golden["gpt_oss"][2].shape[1], 1024)
    np.save(tmp_path / "ids.npy", ids)
    bundle = compress(
        source, tmp_path / "b.emoe", bits=bits, calibration=tmp_path / "ids.npy", tokens=512, trunk_width=8
    )
    checkpoint, made, count = Checkpoint(source), weights_of(bundle.path), 0
    for key, expert in bundle.experts.items():
        if expert.encodings[0].codec == "mxfp4":
            count += 1
            for got, want in zip(bits_of(made.expert(*key)), bits_of(checkpoint.expert(*key)), strict=True):
                np.testing.assert_array_equal(got, want)
    if bits == 7.2:
        assert count == len(bundle.experts)  # nothing is better, at any size
    else:
        assert 0 < count < len(bundle.experts)
        assert bundle.bits_per_weight <= bits


def test_kept_codes_cost_nothing():
    measures = Measures([], [(4, 32), (2, 32)], np.zeros((0, 2)))
    assert KEPT not in allocate.options_of(measures)
    measures.has_codes = True
    assert allocate.options_of(measures)[-1] == KEPT
