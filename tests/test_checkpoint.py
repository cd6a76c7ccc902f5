"""Reading a checkpoint: names, layouts and types, and one clear error for each way it can be damaged."""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from golden_checkpoints import ARCHITECTURES, write_checkpoint

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.config_file import ARCHITECTURES as SUPPORTED

NUMPY = {"F16": np.float16, "F32": np.float32}
DAMAGED = "the checkpoint is damaged, download it again"


def read_file(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """All of a safetensors file: (type, shape, bytes) by name."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = entry["dtype"], entry["shape"], raw[start + first : start + last]
    return tensors


def write_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    write_raw(path, json.dumps(header).encode(), b"".join(data for _, _, data in tensors.values()))


def write_raw(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def bf16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def fuse_experts(tensors: dict) -> dict:
    """The layout transformers 5 has in memory: all experts of a layer in two tensors."""
    fused, experts = {}, {}
    for name, (dtype, shape, data) in tensors.items():
        head, _, tail = name.replace("block_sparse_moe", "mlp").partition(".experts.")
        if not tail:
            fused[head] = (dtype, shape, data)
            continue
        part = tail.split(".")[1]
        part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(part, part)
        experts.setdefault(head, {})[int(tail.split(".")[0]), part] = data, shape
    for head, parts in experts.items():
        count = 1 + max(index for index, _ in parts)
        _, (hidden, dim) = parts[0, "gate_proj"]
        gate_up = (parts[index, part][0] for index in range(count) for part in ("gate_proj", "up_proj"))
        down = (parts[index, "down_proj"][0] for index in range(count))
        fused[f"{head}.experts.gate_up_proj"] = ("BF16", [count, 2 * hidden, dim], b"".join(gate_up))
        fused[f"{head}.experts.down_proj"] = ("BF16", [count, dim, hidden], b"".join(down))
    return fused


def assert_same_tensors(a: Checkpoint, b: Checkpoint) -> None:
    assert a.trunk_names() == b.trunk_names()
    for name in a.trunk_names():
        np.testing.assert_array_equal(a.trunk(name), b.trunk(name))
    for layer in a.config.moe_layers:
        for expert in range(a.config.experts):
            for left, right in zip(a.expert(layer, expert), b.expert(layer, expert), strict=True):
                np.testing.assert_array_equal(left, right)


def shard(directory: Path, shards: int) -> list[str]:
    """Split model.safetensors over several files with an index, as the hub does."""
    tensors = list(read_file(directory / "model.safetensors").items())
    (directory / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        write_file(directory / name, dict(tensors[i::shards]))
    shard_of = {key: names[i % shards] for i, (key, _) in enumerate(tensors)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return names


@pytest.fixture
def olmoe(tmp_path) -> Path:
    return write_checkpoint("olmoe", tmp_path / "olmoe")[0]


# What is read


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_of_the_file_is_reached_and_is_exact(tmp_path, architecture):
    directory, _, _ = write_checkpoint(architecture, tmp_path)
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    found = [checkpoint.trunk(name) for name in checkpoint.trunk_names()]
    assert [part.shape for part in found] == [checkpoint.shape(name) for name in checkpoint.trunk_names()]
    for layer in config.moe_layers:
        for expert in range(config.experts):
            gate, up, down = checkpoint.expert(layer, expert)
            assert gate.shape == up.shape == down.T.shape == (config.expert_hidden, config.dim)
            found += [gate, up, down]
    stored = [bf16(data) for _, _, data in read_file(directory / "model.safetensors").values()]
    assert all(part.dtype == np.float32 for part in found)
    assert sorted(part.tobytes() for part in found) == sorted(part.tobytes() for part in stored)


def test_names_are_canonical_and_in_a_fixed_order(tmp_path):
    directory, _, _ = write_checkpoint("qwen2_moe", tmp_path)
    attention = ["attention_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "o", "mlp_norm"]
    dense = ["dense.gate", "dense.up", "dense.down"]
    moe = ["router", "shared_router", "shared.gate", "shared.up", "shared.down"]
    layers = [[f"layers.{i}.{name}" for name in attention + rest] for i, rest in enumerate([moe, dense, moe])]
    assert Checkpoint(directory).trunk_names() == ["embedding", *sum(layers, []), "output_norm", "head"]


def test_deepseeks_names_are_canonical_and_layers_behind_the_models_own_are_not_read(tmp_path):
    directory, _, _ = write_checkpoint("deepseek_v3", tmp_path)
    tensors = read_file(directory / "model.safetensors")
    last = {name.replace(".2.", ".3."): tensor for name, tensor in tensors.items() if ".layers.2." in name}
    junk = "BF16", [64, 128], bytes(2 * 64 * 128)
    write_file(directory / "model.safetensors", {**tensors, **last, "model.layers.3.eh_proj.weight": junk})
    attention = ["attention_norm", "q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b", "o", "mlp_norm"]
    dense = ["dense.gate", "dense.up", "dense.down"]
    moe = ["router", "router_bias", "shared.gate", "shared.up", "shared.down"]
    layers = [[f"layers.{i}.{name}" for name in attention + rest] for i, rest in enumerate([dense, moe, moe])]
    checkpoint = Checkpoint(directory)
    assert checkpoint.trunk_names() == ["embedding", *sum(layers, []), "output_norm", "head"]
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(checkpoint.trunk("layers.1.router_bias"), bf16(tensors[key][2]))


def test_a_tied_head_is_no_tensor_and_norms_follow_the_projections(olmoe):
    names = Checkpoint(olmoe).trunk_names()
    attention = ["attention_norm", "q", "k", "v", "q_norm", "k_norm", "o", "mlp_norm", "router"]
    layers = [f"layers.{i}.{name}" for i in (0, 1) for name in attention]
    assert names == ["embedding", *layers, "output_norm"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fused_experts_read_the_same_as_separate_ones(tmp_path, architecture):
    plain, _, _ = write_checkpoint(architecture, tmp_path / "plain")
    fused, _, _ = write_checkpoint(architecture, tmp_path / "fused")
    write_file(fused / "model.safetensors", fuse_experts(read_file(plain / "model.safetensors")))
    assert_same_tensors(Checkpoint(plain), Checkpoint(fused))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_read_the_same_as_one_file(tmp_path, architecture):
    plain, _, _ = write_checkpoint(architecture, tmp_path / "plain")
    sharded, _, _ = write_checkpoint(architecture, tmp_path / "sharded")
    shard(sharded, 3)
    assert_same_tensors(Checkpoint(plain), Checkpoint(sharded))


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_half_and_single_precision_are_read_too(olmoe, dtype):
    path = olmoe / "model.safetensors"
    wanted = Checkpoint(olmoe).trunk("layers.0.q").astype(NUMPY[dtype]).astype(np.float32)
    tensors = read_file(path)
    for name, (_, shape, data) in tensors.items():
        tensors[name] = dtype, shape, bf16(data).astype(NUMPY[dtype]).tobytes()
    write_file(path, tensors)
    checkpoint = Checkpoint(olmoe)
    assert checkpoint.dtype("layers.0.q") == dtype
    np.testing.assert_array_equal(checkpoint.trunk("layers.0.q"), wanted)


def test_neither_torch_nor_transformers_is_needed(olmoe):
    code = (
        "import sys; from edge_moe.compressor.source.checkpoint import Checkpoint; "
        "Checkpoint(sys.argv[1]).expert(0, 0); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code, str(olmoe)]) == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted through /proc")
def test_no_file_stays_open(olmoe):
    shard(olmoe, 3)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint(olmoe)
    checkpoint.trunk("embedding")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_checkpoint_reads_nothing_more(olmoe):
    with Checkpoint(olmoe) as checkpoint:
        checkpoint.trunk("embedding")
    with pytest.raises(ValueError):
        checkpoint.trunk("embedding")


# What is refused


def refusal(kind: type[Exception], act) -> str:
    with pytest.raises(kind) as error:
        act()
    assert type(error.value) is kind
    return str(error.value)


def test_an_unsupported_architecture_is_refused(olmoe):
    config = json.loads((olmoe / "config.json").read_text())
    (olmoe / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{olmoe}/config.json: architecture 'llama' is not supported; supported are {', '.join(SUPPORTED)}"
    )


def test_a_directory_without_weights_is_refused(olmoe):
    (olmoe / "model.safetensors").unlink()
    assert refusal(FileNotFoundError, lambda: Checkpoint(olmoe)) == (
        f"{olmoe}: neither model.safetensors nor model.safetensors.index.json is there; "
        "download the checkpoint in safetensors format"
    )


def test_missing_shards_are_named_and_counted(olmoe):
    names = shard(olmoe, 3)
    for name in names[1:]:
        (olmoe / name).unlink()
    assert refusal(FileNotFoundError, lambda: Checkpoint(olmoe)) == (
        f"{olmoe}/{names[1]}: no such file, and 1 more of the 3 shards "
        "that model.safetensors.index.json names are missing; download them"
    )


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": "../x"}, {"a": ".."}, {"a": ""}])
def test_an_index_that_does_not_name_files_of_its_directory_is_refused(olmoe, weight_map):
    (olmoe / "model.safetensors").unlink()
    index = olmoe / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{index}: weight_map is not an object of tensor names and file names; download the file again"
    )


def test_missing_tensors_are_named_and_counted(olmoe):
    path = olmoe / "model.safetensors"
    tensors = read_file(path)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.7.down_proj.weight"]
    write_file(path, tensors)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{olmoe}: tensor model.norm.weight is missing, and 1 more; "
        "config.json and the weights do not belong together, or the download is not complete"
    )


def test_a_tensor_that_is_in_the_index_but_not_in_its_shard_is_missing(olmoe):
    shard(olmoe, 2)
    shard_of = json.loads((olmoe / "model.safetensors.index.json").read_text())["weight_map"]
    path = olmoe / shard_of["model.norm.weight"]
    tensors = read_file(path)
    del tensors["model.norm.weight"]
    write_file(path, tensors)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{olmoe}: tensor model.norm.weight is missing; "
        "config.json and the weights do not belong together, or the download is not complete"
    )


def test_a_tensor_of_another_shape_is_refused(olmoe):
    path, name = olmoe / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = read_file(path)
    dtype, _, data = tensors[name]
    tensors[name] = dtype, [32, 128], data
    write_file(path, tensors)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{path}: tensor {name} has shape (32, 128), config.json makes it "
        "(64, 64); config.json and the weights do not belong together"
    )


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_nan_and_inf_are_refused_when_read(olmoe, bits):
    path, name = olmoe / "model.safetensors", "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors = read_file(path)
    dtype, shape, data = tensors[name]
    tensors[name] = dtype, shape, data[:-2] + bits.to_bytes(2, "little")
    write_file(path, tensors)
    checkpoint = Checkpoint(olmoe)
    checkpoint.expert(0, 2)
    assert refusal(ValueError, lambda: checkpoint.expert(0, 3)) == (
        f"{path}: tensor {name} has NaN or Inf (read for layers.0.experts.3.up); {DAMAGED}"
    )


def test_a_file_cut_after_opening_is_refused_when_read(olmoe):
    path = olmoe / "model.safetensors"
    checkpoint = Checkpoint(olmoe)
    os.truncate(path, path.stat().st_size - 40)
    last = max(read_file(path).items(), key=lambda item: path.read_bytes().find(item[1][2]))
    assert last[0] == "model.norm.weight"
    assert refusal(OSError, lambda: checkpoint.trunk("output_norm")) == (
        f"{path}: tensor model.norm.weight has 44 of 64 values; the file changed while in use, start again"
    )


def test_an_unknown_name_is_refused(olmoe):
    assert refusal(ValueError, lambda: Checkpoint(olmoe).trunk("layers.9.q")) == (
        f"{olmoe}: no tensor 'layers.9.q'; trunk_names() lists what there is"
    )


def test_a_shard_cut_short_is_refused(olmoe):
    path = olmoe / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 40)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{path}: tensor model.norm.weight ends at byte {size:,}, the file has {size - 40:,}; "
        "it was cut short, download it again"
    )


@pytest.mark.parametrize(
    "content, claimed, size",
    [
        (b"", "0", "0"),
        (b"\x05\0\0", "5", "3"),
        (b"\0" * 8, "0", "8"),
        (b"\0\0\0\0\0\0\0\x40 and more", "4,611,686,018,427,387,904", "17"),
        (b"\xc8\0\0\0\0\0\0\0{}", "200", "10"),
    ],
)
def test_a_header_longer_than_its_file_is_refused(olmoe, content, claimed, size):
    path = olmoe / "model.safetensors"
    path.write_bytes(content)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{path}: the header claims {claimed} bytes, the file has {size}; "
        "it is cut short or not a safetensors file, download it again"
    )


@pytest.mark.parametrize("header", [b"{{{{", b"\xff\xff\xff", b"[" * 100_000])
def test_a_header_that_is_not_json_is_refused(olmoe, header):
    path = olmoe / "model.safetensors"
    write_raw(path, header)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{path}: the header is not valid JSON; download it again"
    )


def test_a_header_that_is_no_object_is_refused(olmoe):
    path = olmoe / "model.safetensors"
    write_raw(path, b"[1]")
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{path}: the header is not a JSON object; download it again"
    )


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        3,
        [],
        {},
        {**GOOD, "dtype": 5},
        {**GOOD, "shape": 2},
        {**GOOD, "shape": "2"},
        {**GOOD, "shape": [3]},
        {**GOOD, "shape": [-2]},
        {**GOOD, "shape": [2.0]},
        {**GOOD, "data_offsets": [0]},
        {**GOOD, "data_offsets": [0, 9]},
        {**GOOD, "data_offsets": [-8, 0]},
        {**GOOD, "data_offsets": [0, "8"]},
        {"dtype": "U8", "shape": [2], "data_offsets": [8, 0]},
    ],
)
def test_a_tensor_whose_entry_contradicts_itself_is_refused(olmoe, entry):
    path = olmoe / "model.safetensors"
    write_raw(path, json.dumps({"w": entry}).encode(), b"\0" * 8)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (
        f"{path}: type, shape and offsets of tensor w do not agree; download it again"
    )


def test_overlapping_tensors_are_refused(olmoe):
    path = olmoe / "model.safetensors"
    write_raw(path, json.dumps({"b": {**GOOD, "data_offsets": [4, 12]}, "a": GOOD}).encode(), b"\0" * 12)
    assert refusal(ValueError, lambda: Checkpoint(olmoe)) == (f"{path}: tensors a and b overlap; download it again")
