"""Checkpoints that mlx-lm quantised: every mode reads as mx.dequantize() says, under the names of each family."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bundles import logits_of
from golden_checkpoints import write_checkpoint
from test_checkpoint import bf16, fuse_experts, read_file, refusal, write_file
from test_checkpoint_formats import SUPPORTED

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding.bundle_weights import BundleWeights
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime import reference
from edge_moe.runtime.codecs import Encoding

mx = pytest.importorskip("mlx.core")
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint32": "U32", "uint8": "U8"}
FAMILIES = (
    *("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "glm4_moe", "granitemoe", "minimax_m2", "phimoe"),
    *("qwen3_next", "qwen3_5_moe", "qwen3_vl_moe", "gpt_oss", "gemma4", "lfm2_moe", "nemotron_h"),
    *("deepseek_v3", "deepseek_v32", "moonlight", "glm4_moe_lite", "glm_moe_dsa", "kimi_k25"),  # whose kv_b is split
    "mistral4",  # likewise
)
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.switch_mlp.up_proj.weight"


def stored(array) -> tuple[str, list[int], bytes]:
    name = str(array.dtype).removeprefix("mlx.core.")
    return TYPES[name], list(array.shape), bytes(memoryview(array.view(mx.uint8)))


def write_mlx(source: Path, out: Path, bits: int, group: int, mode: str = "affine", scales=mx.float32) -> dict:
    """Write OLMoE as mlx-lm has it, experts of a layer stacked; gives the values of the matrices, by mlx-lm's name.

    scales: their type in mode affine.
    """
    shutil.copytree(source, out)
    tensors, matrices, values, experts = {}, {}, {}, {}
    for key, (dtype, shape, data) in read_file(out / "model.safetensors").items():
        before, _, rest = key.partition(".experts.")
        if rest:
            number, part, _ = rest.split(".")
            experts.setdefault(f"{before}.switch_mlp.{part}.weight", {})[int(number)] = bf16(data).reshape(shape)
        elif len(shape) == 2:
            matrices[key] = bf16(data).reshape(shape)
        else:
            tensors[key] = dtype, shape, data
    matrices |= {key: np.stack([its[number] for number in sorted(its)]) for key, its in experts.items()}
    for key, matrix in matrices.items():
        how, name = {"group_size": group, "bits": bits, "mode": mode}, key.removesuffix("weight")
        weight = mx.array(matrix)
        parts = mx.quantize(weight, **how)
        if mode == "affine":
            parts = [parts[0], *(part.astype(scales) for part in parts[1:])]
        as_float32 = [parts[0], *(part.astype(mx.float32) if mode == "affine" else part for part in parts[1:])]
        values[key] = np.array(mx.dequantize(*as_float32, **how, dtype=mx.float32))
        for end, part in zip(("weight", "scales", "biases"), parts, strict=False):
            tensors[name + end] = stored(part)
    write_file(out / "model.safetensors", tensors)
    config = json.loads((out / "config.json").read_text())
    about = {"group_size": group, "bits": bits, "mode": mode}
    (out / "config.json").write_text(json.dumps({**config, "quantization": about, "quantization_config": about}))
    return values


@pytest.fixture
def plain(tmp_path) -> Path:
    return write_checkpoint("olmoe", tmp_path / "plain")[0]


def check_values(checkpoint: Checkpoint, values: dict[str, np.ndarray], **how) -> None:
    for layer in range(2):
        at = f"model.layers.{layer}."
        for part in "qkvo":
            wanted = values[f"{at}self_attn.{part}_proj.weight"]
            np.testing.assert_allclose(checkpoint.trunk(f"layers.{layer}.{part}"), wanted, **how)
        for expert in range(8):
            for part, found in zip(("gate", "up", "down"), checkpoint.expert(layer, expert), strict=True):
                np.testing.assert_allclose(found, values[f"{at}mlp.switch_mlp.{part}_proj.weight"][expert], **how)
    np.testing.assert_allclose(checkpoint.trunk("embedding"), values["model.embed_tokens.weight"], **how)


@pytest.mark.parametrize("scales", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32])
def test_affine_codes_of_all_widths_are_dequantised_as_by_mlx(plain, tmp_path, bits, group, scales):
    """MLX may round the product and the sum once, and here each is: half a unit of the larger, code * scale."""
    values = write_mlx(plain, tmp_path / "mlx", bits, group, scales=scales)
    checkpoint = Checkpoint(tmp_path / "mlx")
    assert checkpoint.dtype("layers.0.q") == checkpoint.dtype("layers.1.experts.3.up") == f"MLX{bits}"
    check_values(checkpoint, values, rtol=0, atol=2.0**-24 * max(np.abs(value).max() for value in values.values()) * 2)


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_exponents_are_dequantised_as_by_mlx(plain, tmp_path, mode):
    values = write_mlx(plain, tmp_path / "mlx", *MODES[mode], mode)
    checkpoint = Checkpoint(tmp_path / "mlx")
    check_values(checkpoint, values, rtol=0, atol=0)
    assert checkpoint.has_codes == (mode == "mxfp4")
    if checkpoint.has_codes:
        codes, exponents = checkpoint.codes(1, 5)[1]
        words = mx.array(codes).view(mx.uint32)
        wanted = mx.dequantize(words, mx.array(exponents), group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
        np.testing.assert_array_equal(np.array(wanted), checkpoint.expert(1, 5)[1])


def make_blocks(directory: Path) -> None:
    """Make the experts of gpt-oss MXFP4, random codes with exponents that make weights of about 0.1."""
    path, random = directory / "model.safetensors", np.random.default_rng(0)
    tensors = read_file(path)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        _, (experts, cols, rows), _ = tensors.pop(key)
        codes = random.integers(0, 256, (experts, rows, cols // 32, 16), np.uint8)
        scales = random.integers(121, 125, (experts, rows, cols // 32), np.uint8)
        tensors[f"{key}_blocks"] = "U8", list(codes.shape), codes.tobytes()
        tensors[f"{key}_scales"] = "U8", list(scales.shape), scales.tobytes()
    write_file(path, tensors)


def renamed_by_mlx_lm(architecture: str, source: Path, out: Path) -> None:
    """Write a checkpoint with the tensors that mlx-lm makes of those of `source`."""
    pytest.importorskip("mlx_lm")
    raw = json.loads((source / "config.json").read_text())
    keys = raw.get("text_config", raw)
    keys = {"num_experts": keys.get("num_local_experts"), "num_local_experts": keys.get("num_experts"), **keys}
    keys.setdefault("num_hidden_layers", len(keys.get("layers_block_type", ())))
    model = SimpleNamespace(args=SimpleNamespace(**keys))
    if "text_config" in raw:
        model.language_model = SimpleNamespace(args=model.args)
    if architecture == "qwen3_5_moe":
        rename = import_module("mlx_lm.models.qwen3_5").TextModel.sanitize
        model.language_model.sanitize = lambda tensors: rename(model.language_model, tensors)
        path = source / "model.safetensors"
        write_file(path, fuse_experts(read_file(path)))
    if architecture == "gemma4":
        model.args.num_kv_shared_layers = 0
        own = import_module("mlx_lm.models.gemma4_text").Model.sanitize
        model.language_model.sanitize = lambda tensors: own(model.language_model, tensors)
    file = {"minimax_m2": "minimax", "moonlight": "deepseek_v3"}.get(architecture, architecture)
    tensors = mx.load(str(source / "model.safetensors"))
    tensors = {key.replace("model.blocks.", "model.layers."): tensor for key, tensor in tensors.items()}  # as the hub
    if architecture == "qwen3_vl_moe":  # the hub's have columns first
        fused = [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        tensors |= {key: tensors[key].swapaxes(1, 2) for key in fused}
    tensors = import_module(f"mlx_lm.models.{file}").Model.sanitize(model, tensors)
    out.mkdir()
    mx.save_safetensors(str(out / "model.safetensors"), tensors)
    (out / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_familys_names_in_mlx_lm_are_known(tmp_path, architecture):
    source, _, _ = write_checkpoint(architecture, tmp_path / "source")
    if architecture == "gpt_oss":
        make_blocks(source)
    wanted = Checkpoint(source)
    wanted = {name: wanted.trunk(name) for name in wanted._tensors}
    renamed_by_mlx_lm(architecture, source, tmp_path / "mlx")
    checkpoint = Checkpoint(tmp_path / "mlx")
    stacked = (".switch_mlp.up_proj.weight", ".switch_glu.up_proj.weight", ".experts.up_proj.weight")
    stacked += (".switch_mlp.fc1.weight",)
    assert any(key.endswith(stacked) for key in read_file(tmp_path / "mlx" / "model.safetensors"))
    assert list(checkpoint._tensors) == list(wanted)
    for name, values in wanted.items():
        norm = architecture in ("qwen3_next", "qwen3_5_moe") and name.endswith("norm")  # 1 + w was rounded to bfloat16
        np.testing.assert_allclose(checkpoint.trunk(name), values, rtol=2**-8 if norm else 0)


def test_widths_may_differ_by_layer(tmp_path, plain):
    """config.json has them by module; each tensor's shape tells them, too."""

    def predicate(path, module):
        width = 8 if path.endswith("mlp.gate") else 3 if "switch_mlp.down" in path else 6
        return hasattr(module, "to_quantized") and {"group_size": 32, "bits": width}

    utils = pytest.importorskip("mlx_lm.utils")
    model, config = utils.load_model(plain)
    model, config = utils.quantize_model(model, config, 32, 4, quant_predicate=predicate)
    utils.save_model(tmp_path / "mlx", model)
    utils.save_config(config, tmp_path / "mlx" / "config.json")
    checkpoint = Checkpoint(tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"]["model.layers.1.mlp.gate"]["bits"] == 8
    for name, width in {"layers.1.router": 8, "layers.0.experts.5.down": 3, "layers.1.k": 6, "embedding": 6}.items():
        assert checkpoint.dtype(name) == f"MLX{width}"
    down = model.layers[1].mlp.switch_mlp.down_proj
    parts = [down.weight, down.scales.astype(mx.float32), down.biases.astype(mx.float32)]
    wanted = np.array(mx.dequantize(*parts, group_size=32, bits=3))
    np.testing.assert_allclose(checkpoint.expert(1, 6)[2], wanted[6], rtol=0, atol=1e-7)
    out = compress(tmp_path / "mlx", tmp_path / "out.emoe", bits=8, method="rtn", threads=1)
    assert out.config.architecture == "olmoe"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_codes_with_scales_in_bfloat16_can_be_kept(plain, tmp_path, bits):
    """Some scales are negative. The engine's products differ from float32's by the rounding of inputs, after which a
    token may go to another expert."""
    write_mlx(plain, tmp_path / "mlx", bits, 32, scales=mx.bfloat16)
    checkpoint = Checkpoint(tmp_path / "mlx")
    assert checkpoint.kept_encodings == (Encoding("affine", bits, 32),) * 3
    made = compress(tmp_path / "mlx", tmp_path / "out.emoe", method="keep", threads=1)
    for layer, expert in ((0, 0), (1, 7)):
        kept, wanted = BundleWeights(made).expert(layer, expert), checkpoint.expert(layer, expert)
        scales = np.concatenate([parts[1].ravel() for parts in checkpoint.codes(layer, expert)])
        assert (scales & 0x8000).any()
        for found, its in zip(kept, wanted, strict=True):
            np.testing.assert_allclose(found, its, rtol=0, atol=1e-6)
    ids = np.arange(24)
    wanted = reference.forward(made.config, BundleWeights(made), ids)
    found = logits_of(made.path, ids, ram="8GB", threads=1)
    assert np.median(np.abs(found - wanted)) < 0.02 * wanted.std()


def test_codes_are_not_kept_unless_a_bundle_can_hold_them(plain, tmp_path):
    write_mlx(plain, tmp_path / "mlx", 4, 32, scales=mx.float16)
    assert Checkpoint(tmp_path / "mlx").kept_encodings is None
    assert refusal(ValueError, lambda: compress(tmp_path / "mlx", tmp_path / "out.emoe", method="keep")) == (
        f"{tmp_path}/mlx: method keep needs experts in MXFP4, or in MLX's affine mode with scales in bfloat16, all "
        "alike, which these are not; use bits 16"
    )


# What is refused


def changed(directory: Path, key: str, tensor: tuple | None) -> Path:
    path = directory / "model.safetensors"
    tensors = {**read_file(path), key: tensor}
    write_file(path, {name: value for name, value in tensors.items() if value is not None})
    return path


def test_words_that_are_no_codes_of_the_shape_are_refused(plain, tmp_path):
    write_mlx(plain, tmp_path / "mlx", 4, 32)
    path = changed(tmp_path / "mlx", Q, ("U32", [64, 14], bytes(64 * 14 * 4)))
    assert refusal(ValueError, lambda: Checkpoint(path.parent)) == (
        f"{path}: tensor {Q} has shape (64, 14), config.json makes it (64, 64) in words of codes of 2, 3, 4, 5, 6, 8 "
        "bits; config.json and the weights do not belong together"
    )


def test_scales_of_another_shape_or_type_are_refused(plain, tmp_path):
    write_mlx(plain, tmp_path / "mlx", 4, 32)
    scales = UP.replace("weight", "scales")
    path = tmp_path / "mlx" / "model.safetensors"
    tensors = read_file(path)
    changed(path.parent, scales, ("F32", [8, 32, 3], bytes(8 * 32 * 3 * 4)))
    assert refusal(ValueError, lambda: Checkpoint(path.parent)) == (
        f"{path}: tensor {scales} has shape (8, 32, 3), expected (8, 32, groups of columns), the scales of {UP} "
        "(8, 32, 64); config.json's quantization_config and the weights do not belong together"
    )
    write_file(path, {**tensors, scales: ("U8", [8, 32, 2], bytes(8 * 32 * 2))})
    assert refusal(ValueError, lambda: Checkpoint(path.parent)) == (
        f"{path}: tensor {UP} of 4 bits in groups of 32 with {scales} of type U8 is not supported; {SUPPORTED}"
    )
    biases = UP.replace("weight", "biases")
    write_file(path, {key: tensor for key, tensor in tensors.items() if key != biases})
    assert refusal(ValueError, lambda: Checkpoint(path.parent)) == (
        f"{path}: tensor {UP} of 4 bits in groups of 32 with {scales} of type F32 and no biases is not supported; "
        f"{SUPPORTED}"
    )


def test_one_half_of_a_split_kv_b_may_be_quantised(tmp_path):
    source, _, _ = write_checkpoint("deepseek_v3", tmp_path / "source")
    renamed_by_mlx_lm("deepseek_v3", source, tmp_path / "mlx")
    path, key = tmp_path / "mlx" / "model.safetensors", "model.layers.1.self_attn.unembed_out."
    before = Checkpoint(path.parent).trunk("layers.1.kv_b")
    tensors = read_file(path)
    _, shape, data = tensors.pop(f"{key}weight")
    parts = mx.quantize(mx.array(bf16(data).reshape(shape)), group_size=32, bits=8)
    wanted = np.array(mx.dequantize(*parts, group_size=32, bits=8))
    tensors |= {key + end: stored(part) for end, part in zip(("weight", "scales", "biases"), parts, strict=True)}
    write_file(path, tensors)
    checkpoint = Checkpoint(path.parent)
    attention, both = checkpoint.config.layers[1].attention, (checkpoint.trunk("layers.1.kv_b"), before)
    halves = [one.reshape(attention.heads, -1, attention.kv_rank) for one in both]
    keys = attention.nope_dim
    np.testing.assert_array_equal(halves[0][:, :keys], halves[1][:, :keys])
    np.testing.assert_allclose(halves[0][:, keys:], wanted, rtol=0, atol=1e-7)
    count = wanted.size + 2 * 4 * wanted.size // 32
    assert checkpoint.source_bytes("layers.1.kv_b") == count + 2 * attention.heads * keys * attention.kv_rank
    del tensors[f"{key}weight"]
    write_file(path, tensors)
    assert f"tensor {key}weight is missing" in refusal(ValueError, lambda: Checkpoint(path.parent))
