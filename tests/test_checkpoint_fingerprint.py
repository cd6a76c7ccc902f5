"""Knowing a checkpoint again, and how many bytes reading a tensor takes."""

import json
import os
import shutil

import pytest
from golden_checkpoints import ARCHITECTURES, write_checkpoint
from quantised_checkpoints import write_fp8, write_mxfp4, write_nvfp4
from test_checkpoint import fuse_experts, read_file, refusal, shard, write_file

from edge_moe.compressor.source.checkpoint import Checkpoint


@pytest.fixture
def olmoe(tmp_path):
    return write_checkpoint("olmoe", tmp_path / "olmoe")[0]


def test_a_copy_has_the_same_fingerprint(olmoe, tmp_path):
    shard(olmoe, 2)
    first = Checkpoint(olmoe).fingerprint()
    copy = shutil.copytree(olmoe, tmp_path / "elsewhere")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    (copy / "README.md").write_text("of no account")
    assert Checkpoint(copy).fingerprint() == first
    assert len(first) == 64
    assert set(first) <= set("0123456789abcdef")


# Changes that leave the size of every file as it is, but for those that are changes of it


def change_config(directory):
    path = directory / "config.json"
    path.write_text(path.read_text().replace("silu", "gelu_new", 1))


def change_a_weight(directory):
    path, key = directory / "model.safetensors", "model.layers.1.self_attn.o_proj.weight"
    tensors = read_file(path)
    dtype, shape, data = tensors[key]
    tensors[key] = dtype, shape, bytes([data[0] ^ 1]) + data[1:]
    write_file(path, tensors)


def change_the_order(directory):
    path = directory / "model.safetensors"
    tensors = read_file(path)
    keys = ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"]
    other = dict(zip(keys, reversed(keys), strict=True))
    write_file(path, {other.get(key, key): tensors[other.get(key, key)] for key in tensors})


def change_the_type(directory):
    change_header(directory, 'k_proj.weight": {"dtype": "BF16"', 'k_proj.weight": {"dtype":  "F16"')


def change_the_size(directory):
    with open(directory / "model.safetensors", "ab") as file:
        file.write(b"x")


def change_the_shards(directory):
    shard(directory, 2)


def change_header(directory, old: str, new: str) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    assert old.encode() in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old.encode(), new.encode(), 1))


def test_another_checkpoint_has_another_fingerprint(tmp_path):
    changes = [change_config, change_a_weight, change_the_order, change_the_type, change_the_size, change_the_shards]
    made = []
    for change in [lambda directory: None, *changes]:
        directory, _, _ = write_checkpoint("olmoe", tmp_path / str(len(made)))
        write_file(directory / "model.safetensors", read_file(directory / "model.safetensors"))
        change(directory)
        made.append(Checkpoint(directory).fingerprint())
    assert len(set(made)) == len(made)


def test_scales_are_part_of_the_fingerprint(olmoe, tmp_path):
    write_fp8(olmoe, tmp_path / "fp8", (32, 32), scales="F16")
    first = Checkpoint(tmp_path / "fp8").fingerprint()
    change_header(
        tmp_path / "fp8", 'k_proj.weight_scale_inv": {"dtype": "F16"', 'k_proj.weight_scale_inv": {"dtype":"BF16"'
    )
    assert Checkpoint(tmp_path / "fp8").fingerprint() != first


def test_a_closed_checkpoint_has_no_fingerprint(olmoe):
    checkpoint = Checkpoint(olmoe)
    checkpoint.close()
    assert refusal(ValueError, checkpoint.fingerprint) == (
        f"{olmoe}: no tensor 'embedding'; trunk_names() lists what there is"
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["plain", "fused", "fp8", "mxfp4", "nvfp4"])
def test_source_bytes_of_all_tensors_are_the_bytes_of_the_file(tmp_path, architecture, kind):
    directory, _, _ = write_checkpoint(architecture, tmp_path / "plain")
    if kind == "fp8":
        write_fp8(directory, tmp_path / kind, (24, 40), scales="BF16")
    elif kind == "mxfp4":
        write_mxfp4(directory, tmp_path / kind)
    elif kind == "nvfp4":
        write_nvfp4(directory, tmp_path / kind)
    elif kind == "fused":
        write_file(directory / "model.safetensors", fuse_experts(read_file(directory / "model.safetensors")))
    directory = tmp_path / kind if (tmp_path / kind).exists() else directory
    checkpoint = Checkpoint(directory)
    names = checkpoint.trunk_names()
    for layer in checkpoint.config.moe_layers:
        for index in range(checkpoint.config.experts):
            names += [f"layers.{layer}.experts.{index}.{part}" for part in ("gate", "up", "down")]
    stored = read_file(directory / "model.safetensors").items()
    stored = sum(len(data) for key, (_, _, data) in stored if not key.endswith("input_global_scale"))
    assert sum(checkpoint.source_bytes(name) for name in names) == stored


def test_source_bytes_count_values_and_scales(olmoe, tmp_path):
    """q is 64 x 64: one byte a value and 3 x 2 scales of four; or half a byte and 64 x 2 scales of one."""
    write_fp8(olmoe, tmp_path / "fp8", (24, 48))
    write_mxfp4(olmoe, tmp_path / "mxfp4")
    assert Checkpoint(olmoe).source_bytes("layers.0.q") == 2 * 64 * 64
    assert Checkpoint(tmp_path / "fp8").source_bytes("layers.0.q") == 64 * 64 + 3 * 2 * 4
    assert Checkpoint(tmp_path / "mxfp4").source_bytes("layers.0.q") == 64 * 64 // 2 + 64 * 2
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
