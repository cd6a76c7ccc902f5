"""NVFP4, MXFP8 and whole numbers with scales for small blocks, as compressed-tensors and ModelOpt write them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden_checkpoints import ARCHITECTURES, write_checkpoint
from quantised_checkpoints import write_fp8, write_ints, write_mxfp8, write_nvfp4, write_plain
from test_checkpoint import DAMAGED, assert_same_tensors, read_file, refusal, write_file
from test_checkpoint_formats import NOT_TOGETHER, SUPPORTED, UP, Q, edit, set_quantisation

from edge_moe.compressor.source.checkpoint import Checkpoint


@pytest.fixture
def plain(tmp_path) -> Path:
    """Projections are (64, 64) and (32, 64), experts 32 x 64."""
    return write_checkpoint("olmoe", tmp_path / "plain")[0]


@pytest.mark.parametrize(
    ("bits", "scales", "group"), [(4, "BF16", 32), (4, "F16", 16), (4, "F32", 8), (8, "BF16", 32), (8, "F32", None)]
)
@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])
def test_integers_read_as_the_values_they_stand_for(tmp_path, architecture, bits, scales, group):
    source, _, _ = write_checkpoint(architecture, tmp_path / "source")
    values = write_ints(source, tmp_path / "ints", bits=bits, scales=scales, group=group)
    write_plain(source, tmp_path / "plain", values, "F32")
    checkpoint = Checkpoint(tmp_path / "ints")
    assert checkpoint.dtype("layers.0.o") == checkpoint.dtype("layers.1.experts.0.up") == f"INT{bits}"
    assert checkpoint.dtype("embedding") == "BF16"
    assert_same_tensors(checkpoint, Checkpoint(tmp_path / "plain"))


@pytest.mark.parametrize("method", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvfp4_reads_as_the_values_it_stands_for(tmp_path, architecture, method):
    source, _, _ = write_checkpoint(architecture, tmp_path / "source")
    values = write_nvfp4(source, tmp_path / "nvfp4", method=method)
    write_plain(source, tmp_path / "plain", values, "F32")
    checkpoint = Checkpoint(tmp_path / "nvfp4")
    layer = checkpoint.config.moe_layers[0]
    assert checkpoint.dtype("layers.0.o") == checkpoint.dtype(f"layers.{layer}.experts.0.up") == "NVFP4"
    assert checkpoint.unused == []
    assert_same_tensors(checkpoint, Checkpoint(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("method", "scales"), [("mxfp8", "U8"), ("mxfp8", "F8_E8M0"), ("compressed-tensors", "U8"), ("modelopt", "U8")]
)
@pytest.mark.parametrize("architecture", ["minimax_m2", "olmoe"])
def test_mxfp8_reads_as_the_values_it_stands_for(tmp_path, architecture, method, scales):
    source, _, _ = write_checkpoint(architecture, tmp_path / "source")
    values = write_mxfp8(source, tmp_path / "mxfp8", method=method, scales=scales)
    write_plain(source, tmp_path / "plain", values, "F32")
    checkpoint = Checkpoint(tmp_path / "mxfp8")
    assert checkpoint.dtype("layers.0.o") == checkpoint.dtype("layers.1.experts.0.up") == "F8_E4M3"
    assert_same_tensors(checkpoint, Checkpoint(tmp_path / "plain"))


@pytest.mark.parametrize("write", [write_nvfp4, write_mxfp8])
def test_what_modelopt_says_may_be_in_a_file_of_its_own(plain, tmp_path, write):
    for name in ("inside", "outside"):
        write(plain, tmp_path / name, method="modelopt")
    path = tmp_path / "outside" / "config.json"
    config = json.loads(path.read_text())
    algorithm = config.pop("quantization_config")["quant_algo"]
    path.write_text(json.dumps(config))
    about = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]},
    }
    (path.parent / "hf_quant_config.json").write_text(json.dumps(about))
    assert_same_tensors(Checkpoint(tmp_path / "inside"), Checkpoint(path.parent))
    about["quantization"]["quant_algo"] = "W4A8_AWQ"
    (path.parent / "hf_quant_config.json").write_text(json.dumps(about))
    assert refusal(ValueError, lambda: Checkpoint(path.parent)) == (
        f"{path}: ModelOpt's quant_algo 'W4A8_AWQ' is not supported; {SUPPORTED}"
    )


def test_one_scale_a_row_may_be_a_vector(plain, tmp_path):
    """As ModelOpt's FP8_PER_CHANNEL_PER_TOKEN has them."""
    write_fp8(plain, tmp_path / "columns", (1, None), method="compressed-tensors")
    write_fp8(plain, tmp_path / "vectors", (1, None), method="compressed-tensors")
    path = tmp_path / "vectors" / "model.safetensors"
    scales = {key: (None, [tensor[1][0]], None) for key, tensor in read_file(path).items() if key.endswith("_scale")}
    edit(tmp_path / "vectors", **scales)
    set_quantisation(tmp_path / "vectors", {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"})
    assert_same_tensors(Checkpoint(tmp_path / "columns"), Checkpoint(tmp_path / "vectors"))


def test_kimis_experts_alone_are_integers_as_its_inner_config_says(tmp_path):
    """Kimi-K2.5 has everything but routed experts in bfloat16, below language_model., and says so in text_config."""
    source, _, _ = write_checkpoint("kimi_k25", tmp_path / "source")
    write_ints(source, tmp_path / "whole", group=8)
    quantised, original = (read_file(path / "model.safetensors") for path in (tmp_path / "whole", source))
    tensors = {key: value for key, value in quantised.items() if ".experts." in key and ".weight_" in key}
    packed = {key.removesuffix("_packed") for key in tensors}
    tensors = {**{key: value for key, value in original.items() if key not in packed}, **tensors}
    tensors = {key.replace("model.blocks.", "model.layers."): value for key, value in tensors.items()}
    shutil.copytree(source, tmp_path / "kimi")
    write_file(tmp_path / "kimi" / "model.safetensors", tensors)
    config = json.loads((source / "config.json").read_text())
    said = json.loads((tmp_path / "whole" / "config.json").read_text())["quantization_config"]
    config["text_config"]["quantization_config"] = said
    (tmp_path / "kimi" / "config.json").write_text(json.dumps(config))
    checkpoint, whole, plain = (Checkpoint(path) for path in (tmp_path / "kimi", tmp_path / "whole", source))
    assert checkpoint.dtype("layers.1.experts.0.up") == "INT4" and checkpoint.dtype("layers.0.o") == "BF16"
    for found, wanted in zip(checkpoint.expert(1, 3), whole.expert(1, 3), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(checkpoint.trunk("layers.0.o"), plain.trunk("layers.0.o"))
    config["text_config"]["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (tmp_path / "kimi" / "config.json").write_text(json.dumps(config))
    assert "is quantised with AWQ (4 bits)" in refusal(ValueError, lambda: Checkpoint(tmp_path / "kimi"))


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8", "ints"])
def test_compressed_tensors_decompresses_to_the_same_weights(tmp_path, plain, form):
    pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    write = {"nvfp4": write_nvfp4, "mxfp8": write_mxfp8, "ints": write_ints}[form]
    write(plain, tmp_path / form, **({} if form == "ints" else {"method": "compressed-tensors"}))
    tensors, base = load_file(tmp_path / form / "model.safetensors"), Q.removesuffix("weight")
    about = json.loads((tmp_path / form / "config.json").read_text())["quantization_config"]
    weights = about["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    state = {key.removeprefix(base): value for key, value in tensors.items() if key.startswith(base)}
    if form == "ints":
        state["weight_scale"] = state["weight_scale"].float()
    decompressed = BaseCompressor.get_value_from_registry(about["format"]).decompress(state, scheme)["weight"]
    wanted, found = decompressed.float().numpy(), Checkpoint(tmp_path / form).trunk("layers.0.q")
    if form == "nvfp4":  # the scale and the weight are rounded to bfloat16
        np.testing.assert_allclose(found, wanted, rtol=2**-7)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("method", "factor"), [("compressed-tensors", "_global_scale"), ("modelopt", "_scale_2")])
def test_the_scale_of_a_whole_nvfp4_tensor_is_checked(plain, tmp_path, method, factor):
    write_nvfp4(plain, tmp_path / "nvfp4", method=method)
    path, key = tmp_path / "nvfp4" / "model.safetensors", UP + factor
    tensors = read_file(path)
    packed = UP if method == "modelopt" else f"{UP}_packed"

    def refused(*tensor) -> str:
        write_file(path, {**tensors, key: tensor})
        return refusal(ValueError, lambda: Checkpoint(path.parent).expert(1, 3))

    assert refused("F32", [2], bytes(8)) == (
        f"{path}: tensor {key} has shape (2,), expected (1,), the scales of {packed} (32, 64); {NOT_TOGETHER}"
    )
    assert refused("U8", [1], b"\1") == f"{path}: tensor {key} of type U8 is not supported; {SUPPORTED}"
    if method == "compressed-tensors":
        assert refused("F32", [1], bytes(4)) == (
            f"{path}: tensor {key} has NaN or Inf (read for layers.1.experts.3.up); {DAMAGED}"
        )
        del tensors[key]
        write_file(path, tensors)
        assert refusal(ValueError, lambda: Checkpoint(path.parent)) == (
            f"{path}: tensor {packed} is NVFP4 and {key} is missing; "
            "download the checkpoint again, or use the one that is not quantised"
        )
