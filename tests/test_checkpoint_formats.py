"""Quantised checkpoints read exactly what they stand for; what is not supported has one clear error."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from bundles import logits_of
from golden_checkpoints import ARCHITECTURES, write_checkpoint
from quantised_checkpoints import (
    E4M3,
    nearest,
    write_fp8,
    write_ints,
    write_mxfp4,
    write_plain,
)
from test_checkpoint import DAMAGED, assert_same_tensors, bf16, read_file, refusal, shard, write_file

from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import Bundle

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
SUPPORTED = (
    "supported are BF16, F16, F32; with scales FP8 and MXFP8 (quant_method fp8, mxfp8, modelopt or "
    "compressed-tensors), NVFP4 (modelopt or compressed-tensors), MXFP4 (mxfp4, compressed-tensors, or fp8 with "
    "expert_dtype fp4), symmetric INT4 and INT8 (compressed-tensors); and MLX's modes affine, mxfp4, mxfp8, nvfp4; use "
    "such a checkpoint, best the one that is not quantised"
)
NOT_TOGETHER = "config.json's quantization_config and the weights do not belong together"


@pytest.fixture
def plain(tmp_path) -> Path:
    """Projections are (64, 64) and (32, 64), experts 32 x 64."""
    return write_checkpoint("olmoe", tmp_path / "plain")[0]


@pytest.fixture
def fp8(plain, tmp_path) -> Path:
    """In blocks of 24 x 48, which divide nothing."""
    write_fp8(plain, tmp_path / "fp8", (24, 48))
    return tmp_path / "fp8"


@pytest.fixture
def mxfp4(plain, tmp_path) -> Path:
    write_mxfp4(plain, tmp_path / "mxfp4")
    return tmp_path / "mxfp4"


def edit(directory: Path, **changes) -> Path:
    """Change a tensor of the checkpoint: by key, (dtype, shape, data), of which None is as it was; None drops it."""
    path = directory / "model.safetensors"
    tensors = read_file(path)
    for key, change in changes.items():
        if change is None:
            del tensors[key]
        else:
            tensors[key] = tuple(new if new is not None else old for new, old in zip(change, tensors[key], strict=True))
    write_file(path, tensors)
    return path


def set_quantisation(directory: Path, value) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": value}))


def random_checkpoint(directory: Path, **changes) -> Path:
    """A random Qwen3-MoE that transformers saved."""
    pytest.importorskip("transformers")
    from make_golden import random_model

    random_model("qwen3_moe", seed=3, **changes).save_pretrained(directory)
    return directory


# What is read


@pytest.mark.parametrize(
    "block, options",
    [
        ((24, 48), {}),
        ((128, 128), {"scales": "BF16"}),
        ((32, 32), {"scales": "F16"}),
        ((16, 64), {"scales": "F8_E8M0"}),
        (None, {}),
        ((24, 48), {"method": "compressed-tensors"}),
        ((1, 32), {"method": "compressed-tensors", "scales": "F8_E8M0"}),
        ((1, None), {"method": "compressed-tensors", "scales": "BF16"}),
        (None, {"method": "compressed-tensors"}),
        ((1, None), {}),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp8_reads_as_the_values_it_stands_for(tmp_path, architecture, block, options):
    source, _, _ = write_checkpoint(architecture, tmp_path / "source")
    values = write_fp8(source, tmp_path / "fp8", block, **options)
    write_plain(source, tmp_path / "plain", values, "F32")
    checkpoint = Checkpoint(tmp_path / "fp8")
    layer = checkpoint.config.moe_layers[0]
    assert checkpoint.dtype("layers.0.o") == checkpoint.dtype(f"layers.{layer}.experts.0.up") == "F8_E4M3"
    assert checkpoint.dtype("embedding") == checkpoint.dtype(f"layers.{layer}.router") == "BF16"
    assert_same_tensors(checkpoint, Checkpoint(tmp_path / "plain"))


@pytest.mark.parametrize("scales", ["U8", "F8_E8M0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mxfp4_reads_as_the_values_it_stands_for(tmp_path, architecture, scales):
    source, _, _ = write_checkpoint(architecture, tmp_path / "source")
    values = write_mxfp4(source, tmp_path / "mxfp4", scales=scales)
    write_plain(source, tmp_path / "plain", values, "BF16")
    checkpoint = Checkpoint(tmp_path / "mxfp4")
    layer = checkpoint.config.moe_layers[0]
    assert checkpoint.dtype("layers.0.o") == checkpoint.dtype(f"layers.{layer}.experts.0.up") == "MXFP4"
    assert_same_tensors(checkpoint, Checkpoint(tmp_path / "plain"))


def test_every_int4_word_is_what_compressed_tensors_makes_of_it(tmp_path, plain):
    pytest.importorskip("torch")
    compressed_tensors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    import torch

    write_ints(plain, tmp_path / "ints")
    path = tmp_path / "ints" / "model.safetensors"
    tensors = read_file(path)
    words = np.frombuffer(tensors[f"{Q}_packed"][2], "<i4").reshape(tensors[f"{Q}_packed"][1])
    codes = compressed_tensors.unpack_from_int32(torch.from_numpy(words.copy()), 4, tuple(plain_shape(plain)))
    scales = bf16(tensors[f"{Q}_scale"][2]).reshape(len(words), -1)
    wanted = codes.float().numpy() * scales.repeat(32, axis=1)
    assert Checkpoint(tmp_path / "ints").trunk("layers.0.q").tobytes() == wanted.astype("<f4").tobytes()


def plain_shape(directory):
    return read_file(directory / "model.safetensors")[Q][1]


@pytest.mark.parametrize("write", [write_fp8, write_mxfp4, write_ints])
def test_scales_may_be_in_another_shard_than_their_values(plain, tmp_path, write):
    write(plain, tmp_path / "one")
    write(plain, tmp_path / "shards")
    shard(tmp_path / "shards", 3)
    assert_same_tensors(Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "shards"))


def test_every_fp8_code_is_what_torch_makes_of_it(fp8):
    torch = pytest.importorskip("torch")
    codes = np.tile(np.arange(256, dtype=np.uint8), 16)
    codes[codes & 127 == 127] = 0
    edit(fp8, **{Q: (None, None, codes.tobytes()), f"{Q}_scale_inv": (None, None, np.ones((3, 2), "f4").tobytes())})
    wanted = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert Checkpoint(fp8).trunk("layers.0.q").tobytes() == wanted.tobytes()


def test_the_tests_round_to_fp8_as_torch_does():
    torch = pytest.importorskip("torch")
    spread = np.random.default_rng(0).standard_normal((2, 100_000)) * [[100], [0.01]]
    x = np.concatenate([spread.ravel(), (E4M3[:-1] + E4M3[1:]) / 2, E4M3]).astype(np.float32).clip(-448, 448)
    codes = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(nearest(x, E4M3), codes & 127)


def test_fp8_in_blocks_of_128_is_what_torch_dequantises(tmp_path):
    """Neither 200 rows or columns nor 151 are multiples of 128, nor are 151 even."""
    source = random_checkpoint(tmp_path / "source", hidden_size=200, moe_intermediate_size=151, head_dim=38)
    write_fp8(source, tmp_path / "fp8")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "fp8")

    def dequantised(key: str) -> np.ndarray:
        weight, scale = tensors[f"{key}.weight"], tensors[f"{key}.weight_scale_inv"]
        rows, cols = weight.shape
        scale = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        return (weight.float() * scale).numpy()

    for layer in range(2):
        for part in "qkvo":
            wanted = dequantised(f"model.layers.{layer}.self_attn.{part}_proj")
            assert checkpoint.trunk(f"layers.{layer}.{part}").tobytes() == wanted.tobytes()
        for index in range(6):
            for part, found in zip(("gate", "up", "down"), checkpoint.expert(layer, index), strict=True):
                wanted = dequantised(f"model.layers.{layer}.mlp.experts.{index}.{part}_proj")
                assert found.tobytes() == wanted.tobytes()


def test_transformers_reads_the_same_from_an_fp8_checkpoint(tmp_path):
    source = random_checkpoint(tmp_path / "source", hidden_size=256, moe_intermediate_size=128, head_dim=64)
    write_fp8(source, tmp_path / "fp8")
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    checkpoint = Checkpoint(tmp_path / "fp8")
    for number, layer in enumerate(model.model.layers):
        for part in "qkvo":
            wanted = getattr(layer.self_attn, f"{part}_proj").weight.detach().numpy()
            np.testing.assert_array_equal(checkpoint.trunk(f"layers.{number}.{part}"), wanted)
        experts = layer.mlp.experts
        for index in range(6):
            gate, up, down = checkpoint.expert(number, index)
            np.testing.assert_array_equal(np.concatenate([gate, up]), experts.gate_up_proj[index].detach().numpy())
            np.testing.assert_array_equal(down, experts.down_proj[index].detach().numpy())


def test_every_mxfp4_byte_and_exponent_is_what_transformers_makes_of_it(mxfp4):
    pytest.importorskip("transformers")
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes = np.tile(np.arange(256, dtype=np.uint8), 8).reshape(64, 32)
    scales = np.arange(128, dtype=np.uint8).reshape(64, 2) * 2  # 0 to 254; 6 * 2^127 would be Inf
    codes[62:], scales[63] = 0x31, (252, 253)
    edit(mxfp4, **{f"{Q}_packed": (None, None, codes.tobytes()), f"{Q}_scale": (None, None, scales.tobytes())})
    blocks, scales = torch.from_numpy(codes.reshape(1, 64, 2, 16)), torch.from_numpy(scales[None])
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T.contiguous().numpy()
    assert Checkpoint(mxfp4).trunk("layers.0.q").tobytes() == wanted.tobytes()


def fuse_fp8(directory: Path) -> None:
    """Make all experts of a layer two tensors and their scales, the layout transformers 5 has in memory."""
    path = directory / "model.safetensors"
    fused, experts = {}, {}
    for key, (dtype, shape, data) in read_file(path).items():
        head, _, tail = key.partition(".experts.")
        if not tail:
            fused[key] = dtype, shape, data
            continue
        index, part, suffix = tail.split(".")
        array = np.frombuffer(data, "u1" if dtype == "F8_E4M3" else "f4").reshape(shape)
        experts.setdefault((head, suffix.removeprefix("weight"), dtype), {})[int(index), part] = array
    for (head, suffix, dtype), parts in experts.items():
        count = 1 + max(index for index, _ in parts)
        gate_up = [[parts[index, part] for part in ("gate_proj", "up_proj")] for index in range(count)]
        gate_up = np.stack([np.concatenate(pair) for pair in gate_up])
        down = np.stack([parts[index, "down_proj"] for index in range(count)])
        fused[f"{head}.experts.gate_up_proj{suffix}"] = dtype, list(gate_up.shape), gate_up.tobytes()
        fused[f"{head}.experts.down_proj{suffix}"] = dtype, list(down.shape), down.tobytes()
    write_file(path, fused)


@pytest.mark.parametrize("block", [(16, 48), (32, 128), (1, 40)])
def test_fused_fp8_experts_read_the_same_as_separate_ones(plain, tmp_path, block):
    write_fp8(plain, tmp_path / "separate", block)
    write_fp8(plain, tmp_path / "fused", block)
    fuse_fp8(tmp_path / "fused")
    assert_same_tensors(Checkpoint(tmp_path / "separate"), Checkpoint(tmp_path / "fused"))


def test_one_scale_may_be_for_the_gate_and_up_of_a_fused_expert(plain, tmp_path):
    """Gate and up are 64 rows together; expert e has the scale e + 1."""
    for name in ("separate", "fused"):
        write_fp8(plain, tmp_path / name, (64, 64))
        edit(
            tmp_path / name,
            **{
                key: (None, None, np.float32(int(key.split(".")[5]) + 1).tobytes())
                for key in read_file(tmp_path / name / "model.safetensors")
                if ".experts." in key and key.endswith("_scale_inv")
            },
        )
    fuse_fp8(tmp_path / "fused")
    scales = np.arange(1, 9, dtype="f4").tobytes()
    for layer in range(2):
        key = f"model.layers.{layer}.mlp.experts.gate_up_proj_scale_inv"
        edit(tmp_path / "fused", **{key: (None, [8, 1, 1], scales)})
    assert_same_tensors(Checkpoint(tmp_path / "separate"), Checkpoint(tmp_path / "fused"))


def test_of_a_fused_tensor_only_the_expert_asked_for_is_read(fp8, plain, tmp_path):
    write_fp8(plain, tmp_path / "fused", (16, 48))
    fuse_fp8(tmp_path / "fused")
    key = "model.layers.1.mlp.experts.gate_up_proj"
    codes = bytearray(read_file(tmp_path / "fused" / "model.safetensors")[key][2])
    codes[5 * 64 * 64 + 32 * 64] = 0x7F  # the first of the up of expert 5
    path = edit(tmp_path / "fused", **{key: (None, None, bytes(codes))})
    checkpoint = Checkpoint(tmp_path / "fused")
    for name in ("4.gate", "4.up", "5.gate", "6.gate"):
        checkpoint.trunk(f"layers.1.experts.{name}")
    assert refusal(ValueError, lambda: checkpoint.trunk("layers.1.experts.5.up")) == (
        f"{path}: tensor {key} has NaN or Inf (read for layers.1.experts.5.up); {DAMAGED}"
    )


def test_reading_takes_little_memory_beyond_the_result(tmp_path):
    source = random_checkpoint(tmp_path / "source", hidden_size=1536, moe_intermediate_size=32, head_dim=256)
    write_fp8(source, tmp_path / "fp8")
    write_mxfp4(source, tmp_path / "mxfp4")
    for name in ("fp8", "mxfp4"):
        checkpoint = Checkpoint(tmp_path / name)
        checkpoint.trunk("layers.0.k")  # makes the tables
        tracemalloc.start()
        q = checkpoint.trunk("layers.0.q")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert q.shape == (1024, 1536)
        assert q.nbytes < peak < q.nbytes + 2_000_000  # codes, indices and scales of 65,536 values


@pytest.mark.parametrize("options", [{"bits": 16}, {"width": 3, "method": "rtn"}])
@pytest.mark.parametrize("write, dtype", [(write_fp8, "F32"), (write_fp8, "BF16"), (write_mxfp4, "BF16")])
def test_a_quantised_checkpoint_compresses_to_the_same_weights_as_its_values(tmp_path, write, dtype, options):
    source, token_ids, _ = write_checkpoint("qwen3_moe", tmp_path / "source")
    extra = {"powers_of_two": True} if (write, dtype) == (write_fp8, "BF16") else {}
    write_plain(source, tmp_path / "plain", write(source, tmp_path / "quantised", **extra), dtype)
    for name in ("quantised", "plain"):
        compress(tmp_path / name, tmp_path / f"{name}.emoe", threads=1, **options)
    made = Bundle.open(tmp_path / "quantised.emoe")
    files = sorted(path.name for path in (tmp_path / "plain.emoe").glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        assert (made.path / name).read_bytes() == (tmp_path / "plain.emoe" / name).read_bytes()
    assert "quantization_config" in json.loads((made.path / "config.json").read_text())
    logits = [logits_of(tmp_path / f"{name}.emoe", token_ids, ram="2GB", threads=1) for name in ("quantised", "plain")]
    np.testing.assert_array_equal(*logits)


# What is refused


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "quantised with GPTQ (4 bits, group 128)"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "quantised with AWQ (4 bits, group 64)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes (4 bits)"),
    ],
)
def test_a_checkpoint_that_is_quantised_already_is_refused_by_the_name_of_its_form(plain, config, name):
    set_quantisation(plain, config)
    assert refusal(ValueError, lambda: Checkpoint(plain)) == (
        f"{plain}/config.json: is {name}; edge-moe compresses from the original checkpoint: download that one"
    )


@pytest.mark.parametrize("method", ["quark", "modelopt_x", None, ["fp8"]])
def test_another_quantisation_method_is_refused(plain, method):
    set_quantisation(plain, {"quant_method": method, "bits": 4})
    assert refusal(ValueError, lambda: Checkpoint(plain)) == (
        f"{plain}/config.json: quantisation method {method!r} is not supported; {SUPPORTED}"
    )


def test_another_mode_of_mlx_or_algorithm_of_modelopt_is_refused(plain):
    set_quantisation(plain, {"group_size": 64, "bits": 4, "mode": "vector"})
    assert refusal(ValueError, lambda: Checkpoint(plain)) == (
        f"{plain}/config.json: MLX's quantisation mode 'vector' is not supported; {SUPPORTED}"
    )
    set_quantisation(plain, {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"})
    assert refusal(ValueError, lambda: Checkpoint(plain)) == (
        f"{plain}/config.json: ModelOpt's quant_algo 'NVFP4_AWQ' is not supported; {SUPPORTED}"
    )


def test_rotated_weights_are_refused(plain):
    set_quantisation(plain, {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}})
    assert refusal(ValueError, lambda: Checkpoint(plain)) == (
        f"{plain}/config.json: transform_config (rotated weights) is not supported; {SUPPORTED}"
    )


@pytest.mark.parametrize(
    "value, message",
    [
        ("fp8", "quantization_config is 'fp8', expected an object"),
        (
            {"quant_method": "compressed-tensors", "config_groups": [1]},
            "config_groups is [1], expected an object",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "weight_block_size is [128], expected two numbers of rows and columns above 0",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 0]},
            "weight_block_size is [128, 0], expected two numbers of rows and columns above 0",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"block_structure": "2x4"}}}},
            "block_structure is '2x4', expected two numbers of rows and columns above 0",
        ),
    ],
)
def test_a_quantization_config_that_says_nonsense_is_refused(plain, value, message):
    set_quantisation(plain, value)
    assert refusal(ValueError, lambda: Checkpoint(plain)) == f"{plain}/config.json: {message}"


def test_a_quantization_config_of_null_or_of_odd_groups_changes_nothing(plain, tmp_path):
    before = Checkpoint(plain).trunk("layers.0.q")
    for value in (None, {"quant_method": "compressed-tensors", "config_groups": {"a": 3, "b": {"weights": None}}}):
        set_quantisation(plain, value)
        np.testing.assert_array_equal(Checkpoint(plain).trunk("layers.0.q"), before)


@pytest.mark.parametrize("dtype", ["I64", "I8", "F8_E5M2", "U8"])
def test_another_type_is_refused(plain, dtype):
    path = edit(plain, **{UP: (dtype, None, bytes(32 * 64 * (8 if dtype == "I64" else 1)))})
    assert refusal(ValueError, lambda: Checkpoint(plain)) == (
        f"{path}: tensor {UP} of type {dtype} is not supported; {SUPPORTED}"
    )


def test_an_fp8_vector_is_refused(plain):
    path = edit(plain, **{"model.norm.weight": ("F8_E4M3", None, bytes(64))})
    assert refusal(ValueError, lambda: Checkpoint(plain)) == (
        f"{path}: tensor model.norm.weight of type F8_E4M3 is not supported; {SUPPORTED}"
    )


@pytest.mark.parametrize("key, dtype", [(f"{UP}_packed", "F8_E4M3"), (f"{UP}_scale", "F16"), (f"{UP}_scale", "BF16")])
def test_other_packed_weights_are_refused(mxfp4, key, dtype):
    data = None if key.endswith("_packed") else bytes(32 * 4)
    path = edit(mxfp4, **{key: (dtype, None, data)})
    assert refusal(ValueError, lambda: Checkpoint(mxfp4)) == (
        f"{path}: tensor {key} of type {dtype} is not supported; {SUPPORTED}"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{UP}_zero_point": ("I32", [4, 4], bytes(64))},
            "{packed} of integers with zero points, or in another order",
        ),
        ({f"{UP}_g_idx": ("I32", [4], bytes(16))}, "{packed} of integers with zero points, or in another order"),
        ({f"{UP}_scale": ("U8", None, bytes(32 * 2))}, f"{UP}_scale of type U8"),
    ],
)
def test_other_integers_of_four_bits_are_refused(plain, tmp_path, changes, message):
    write_ints(plain, tmp_path / "ints")
    path = tmp_path / "ints" / "model.safetensors"
    tensors = read_file(path)
    changes = {key: (dtype, shape or tensors[key][1], data) for key, (dtype, shape, data) in changes.items()}
    write_file(path, {**tensors, **changes})
    assert refusal(ValueError, lambda: Checkpoint(tmp_path / "ints")) == (
        f"{path}: tensor {message.format(packed=f'{UP}_packed')} is not supported; {SUPPORTED}"
    )


def test_int4_scales_of_another_shape_are_refused(plain, tmp_path):
    write_ints(plain, tmp_path / "ints")
    path = tmp_path / "ints" / "model.safetensors"
    tensors = read_file(path)
    dtype, (rows, groups), data = tensors[f"{UP}_scale"]
    write_file(path, {**tensors, f"{UP}_scale": (dtype, [rows * groups, 1], data)})
    said = refusal(ValueError, lambda: Checkpoint(tmp_path / "ints"))
    assert said.startswith(f"{path}: tensor {UP}_scale has shape ({rows * groups}, 1), expected ({rows}, groups of ")


def test_fp8_scales_of_another_type_are_refused(fp8):
    key = f"{UP}_scale_inv"
    path = edit(fp8, **{key: ("U32", None, None)})
    assert refusal(ValueError, lambda: Checkpoint(fp8)) == (
        f"{path}: tensor {key} of type U32 is not supported; {SUPPORTED}"
    )


@pytest.mark.parametrize("kind, values, scales", [("fp8", UP, "_scale_inv"), ("mxfp4", f"{UP}_packed", "_scale")])
def test_missing_scales_are_named(request, kind, values, scales):
    directory = request.getfixturevalue(kind)
    path = edit(directory, **{UP + scales: None})
    dtype = {"fp8": "F8_E4M3", "mxfp4": "MXFP4"}[kind]
    assert refusal(ValueError, lambda: Checkpoint(directory)) == (
        f"{path}: tensor {values} is {dtype} and its scales {UP}{scales} are missing; "
        "download the checkpoint again, or use the one that is not quantised"
    )


@pytest.mark.parametrize("shape", [[2, 3], [1, 2], [4], [2, 2, 1], []])
def test_fp8_scales_that_do_not_fit_the_block_size_are_refused(fp8, shape):
    path = edit(fp8, **{f"{UP}_scale_inv": (None, shape, bytes(4 * int(np.prod(shape))))})
    assert refusal(ValueError, lambda: Checkpoint(fp8)) == (
        f"{path}: tensor {UP}_scale_inv has shape {tuple(shape)}, expected (2, 2), the scales of {UP} (32, 64); "
        f"{NOT_TOGETHER}"
    )


@pytest.mark.parametrize(
    "quantisation, wanted",
    [
        ({"quant_method": "fp8", "weight_block_size": [16, 24]}, "(4, 3)"),
        ({"quant_method": "fp8"}, "(1, 1) or (64, 1) or (64, 2)"),
        ({"quant_method": "mxfp8"}, "(64, 2)"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"block_structure": [8, 48]}}}},
            "(1, 1) or (64, 1) or (8, 2)",
        ),
    ],
)
def test_a_block_size_that_does_not_fit_the_scales_is_refused(fp8, quantisation, wanted):
    set_quantisation(fp8, quantisation)
    assert refusal(ValueError, lambda: Checkpoint(fp8)) == (
        f"{fp8}/model.safetensors: tensor {Q}_scale_inv has shape (3, 2), expected {wanted}, "
        f"the scales of {Q} (64, 64); {NOT_TOGETHER}"
    )


def test_mxfp4_scales_of_another_shape_are_refused(mxfp4):
    path = edit(mxfp4, **{f"{UP}_scale": (None, [16, 4], None)})
    assert refusal(ValueError, lambda: Checkpoint(mxfp4)) == (
        f"{path}: tensor {UP}_scale has shape (16, 4), expected (32, 2), the scales of {UP}_packed (32, 64); "
        f"{NOT_TOGETHER}"
    )


def test_packed_values_of_another_shape_are_refused(mxfp4):
    path = edit(mxfp4, **{f"{UP}_packed": (None, [16, 64], None)})
    assert refusal(ValueError, lambda: Checkpoint(mxfp4)) == (
        f"{path}: tensor {UP}_packed has shape (16, 64), config.json makes it (32, 32); "
        "config.json and the weights do not belong together"
    )


def test_mxfp4_of_columns_that_are_no_whole_blocks_is_refused(tmp_path):
    source = random_checkpoint(tmp_path / "source", moe_intermediate_size=48)
    tensors, key = read_file(source / "model.safetensors"), "model.layers.0.mlp.experts.0.down_proj.weight"
    del tensors[key]
    tensors[f"{key}_packed"] = "U8", [64, 24], bytes(64 * 24)
    write_file(source / "model.safetensors", tensors)
    assert refusal(ValueError, lambda: Checkpoint(source)) == (
        f"{source}/model.safetensors: tensor {key}_packed is MXFP4, which has blocks of 32 columns, and config.json "
        "makes it (64, 48); config.json and the weights do not belong together"
    )


def test_fused_blocks_that_go_over_from_gate_to_up_are_refused(plain, tmp_path):
    write_fp8(plain, tmp_path / "fused", (20, 64))
    fuse_fp8(tmp_path / "fused")
    assert refusal(ValueError, lambda: Checkpoint(tmp_path / "fused")) == (
        f"{tmp_path}/fused/model.safetensors: tensor model.layers.0.mlp.experts.gate_up_proj has gate and up of "
        "32 rows each, which blocks of 20 rows do not divide; use a checkpoint whose experts are stored one by one"
    )


@pytest.mark.parametrize(
    "kind, suffix, data",
    [
        ("fp8", "", b"\x7f"),
        ("fp8", "", b"\xff"),
        ("fp8", "_scale_inv", np.float32(np.nan).tobytes()),
        ("fp8", "_scale_inv", np.float32(-np.inf).tobytes()),
        ("mxfp4", "_scale", b"\xff"),
    ],
)
def test_nan_and_inf_are_refused_when_read(request, kind, suffix, data):
    directory, key = request.getfixturevalue(kind), UP + suffix
    stored = read_file(directory / "model.safetensors")[key][2]
    path = edit(directory, **{key: (None, None, stored[: -len(data)] + data)})
    checkpoint = Checkpoint(directory)
    checkpoint.expert(1, 2)
    assert refusal(ValueError, lambda: checkpoint.expert(1, 3)) == (
        f"{path}: tensor {key} has NaN or Inf (read for layers.1.experts.3.up); {DAMAGED}"
    )


@pytest.mark.parametrize(
    "kind, values, scale, largest",
    [("fp8", UP, "_scale_inv", np.float32(3e38).tobytes()), ("mxfp4", f"{UP}_packed", "_scale", b"\xfe")],
)
def test_values_beyond_float32_are_refused_when_read(request, kind, values, scale, largest):
    directory = request.getfixturevalue(kind)
    scales = read_file(directory / "model.safetensors")[UP + scale][2]
    path = edit(directory, **{UP + scale: (None, None, largest * (len(scales) // len(largest)))})
    assert refusal(ValueError, lambda: Checkpoint(directory).expert(1, 3)) == (
        f"{path}: tensor {values} has NaN or Inf (read for layers.1.experts.3.up); {DAMAGED}"
    )


@pytest.mark.parametrize(
    "kind, key, left, found, of",
    [
        ("fp8", Q, 100, 100, "4,096"),
        ("fp8", Q, 0, 0, "4,096"),
        ("fp8", f"{Q}_scale_inv", 9, 2, "6"),
        ("mxfp4", f"{Q}_packed", 100, 200, "4,096"),
        ("mxfp4", f"{Q}_scale", 9, 9, "128"),
    ],
)
def test_a_file_cut_after_opening_is_refused_when_read(request, kind, key, left, found, of):
    path = request.getfixturevalue(kind) / "model.safetensors"
    tensors = read_file(path)
    tensors[key] = tensors.pop(key)  # the last in the file
    write_file(path, tensors)
    checkpoint = Checkpoint(path.parent)
    os.truncate(path, path.stat().st_size - len(tensors[key][2]) + left)
    assert refusal(OSError, lambda: checkpoint.trunk("layers.0.q")) == (
        f"{path}: tensor {key} has {found} of {of} values; the file changed while in use, start again"
    )
