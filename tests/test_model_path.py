"""What is given as a model, and is none, is called by its true name in every subcommand that takes one."""

import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from golden_checkpoints import write_checkpoint
from test_checkpoint import read_file, shard, write_file
from test_cli import error_of

from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.config_file import ARCHITECTURES
from edge_moe.runtime.model_path import find_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 4976698672\n"


def changed(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def gguf_file(directory: Path) -> tuple[str, str]:
    file = directory / "model-q4.bin"
    file.write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    return file, f"{file}: is a GGUF file, not a bundle; make one with `edge-moe compress {file} OUT`"


def gguf_directory(directory: Path) -> tuple[str, str]:
    for name in ("config.json", "model.safetensors"):
        (directory / name).unlink()
    file = directory / "q4.gguf"
    file.write_bytes(b"GGUF")
    return directory, f"{file}: is a GGUF file, not a bundle; make one with `edge-moe compress {file} OUT`"


def awq(directory: Path) -> tuple[str, str]:
    changed(directory, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 128})
    return directory, (
        f"{directory}/config.json: is quantised with AWQ (4 bits, group 128); "
        "edge-moe compresses from the original checkpoint: download that one"
    )


def dense(directory: Path) -> tuple[str, str]:
    path = directory / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if "expert" not in key}
    path.write_text(json.dumps({**raw, "model_type": "qwen3"}))
    return directory, (
        f"{path}: architecture 'qwen3' is not supported; supported are {', '.join(ARCHITECTURES)}; "
        "this is a dense model, and edge-moe runs mixtures of experts"
    )


def pointer(directory: Path) -> tuple[str, str]:
    (directory / "config.json").write_bytes(POINTER)
    return directory, (
        f"{directory}/config.json: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    )


@pytest.mark.parametrize(
    ("command", "make"),
    [
        *product(("compress", "plan"), (awq, dense, pointer)),
        *product(("inspect", "generate", "chat"), (gguf_file, gguf_directory, awq, dense, pointer)),
        *product(("eval",), (awq, dense, pointer)),
    ],
)
def test_every_subcommand_says_what_a_model_is_that_it_cannot_take(golden, bundle_of, tmp_path, make, command):
    path, message = make(Path(shutil.copytree(golden["olmoe"][0], tmp_path / "model")))
    (tmp_path / "text.txt").write_text("text")
    arguments = {
        "compress": ("compress", path, tmp_path / "out.emoe"),
        "generate": ("generate", path, "-p", "x"),
        "eval": ("eval", bundle_of("olmoe", width=8), "--text", tmp_path / "text.txt", "--against", path),
    }
    assert error_of(*arguments.get(command, (command, path))) == message


# ---- checkpoints


@pytest.fixture
def olmoe(tmp_path) -> Path:
    return write_checkpoint("olmoe", tmp_path / "olmoe")[0]


def refusal(error, directory: Path) -> str:
    with pytest.raises(error) as caught:
        Checkpoint(directory)
    return str(caught.value)


def test_weights_that_are_a_pointer_are_called_so(olmoe):
    names = shard(olmoe, 2)
    (olmoe / names[1]).write_bytes(POINTER)
    assert refusal(ValueError, olmoe) == (
        f"{olmoe / names[1]}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    )


def test_pytorch_files_are_called_so(olmoe):
    (olmoe / "model.safetensors").rename(olmoe / "pytorch_model.bin")
    assert refusal(ValueError, olmoe) == (
        f"{olmoe / 'pytorch_model.bin'}: is a PyTorch file; edge-moe reads safetensors: download the checkpoint in "
        "that format, or load it with transformers and save_pretrained() it"
    )


def test_one_file_of_a_checkpoint_is_no_model(olmoe):
    file = olmoe / "model.safetensors"
    assert refusal(ValueError, file) == f"{file}: is one file of a checkpoint; name its directory, {olmoe}"


def test_one_missing_shard_is_named_in_good_english(olmoe):
    names = shard(olmoe, 3)
    (olmoe / names[2]).unlink()
    assert refusal(FileNotFoundError, olmoe) == (
        f"{olmoe / names[2]}: no such file, the only one of the 3 shards that model.safetensors.index.json names that "
        "is missing; download it"
    )


def test_an_index_that_leaves_tensors_out_changes_nothing(olmoe):
    wanted = Checkpoint(olmoe).trunk("layers.1.k")
    shard(olmoe, 2)
    index = olmoe / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    for key in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
        del shard_of[key]
    index.write_text(json.dumps({"weight_map": shard_of}))
    np.testing.assert_array_equal(Checkpoint(olmoe).trunk("layers.1.k"), wanted)


def test_a_tensor_in_two_shards_is_that_of_the_index_or_refused(olmoe):
    wanted = Checkpoint(olmoe).trunk("output_norm")
    names, key = shard(olmoe, 2), "model.norm.weight"
    index = olmoe / "model.safetensors.index.json"
    shard_of = json.loads(index.read_text())["weight_map"]
    (other,) = set(names) - {shard_of[key]}
    dtype, shape, data = read_file(olmoe / shard_of[key])[key]
    write_file(olmoe / other, {**read_file(olmoe / other), key: (dtype, shape, bytes(len(data)))})
    np.testing.assert_array_equal(Checkpoint(olmoe).trunk("output_norm"), wanted)
    del shard_of[key]
    index.write_text(json.dumps({"weight_map": shard_of}))
    assert (
        refusal(ValueError, olmoe) == f"{index}: tensor {key} is in {names[0]} and in {names[1]}; download both again"
    )


def test_a_base_model_without_its_head_is_called_so(tmp_path):
    directory = write_checkpoint("mixtral", tmp_path)[0]
    path = directory / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_file(path).items()}
    del tensors["lm_head.weight"]
    write_file(path, tensors)
    assert refusal(ValueError, directory) == (
        f"{directory}: tensor lm_head.weight is missing: the checkpoint was saved without its output head; "
        "save the model for causal language modelling"
    )


@pytest.mark.parametrize(
    "key",
    ["model.layers.0.mlp.shared_expert.gate_proj.weight", "model.layers.1.self_attn.q_proj.bias", "lm_head.bias"],
)
def test_a_weight_that_is_there_and_not_used_is_refused_by_name(olmoe, key):
    path = olmoe / "model.safetensors"
    write_file(path, {**read_file(path), key: ("BF16", [64], bytes(128))})
    assert refusal(ValueError, olmoe) == (
        f"{olmoe}: tensor {key} is there, which olmoe with this config.json does not use; "
        "config.json and the weights do not belong together"
    )


def test_weights_of_what_is_no_part_of_the_model_are_named(olmoe):
    path, keys = olmoe / "model.safetensors", ["model.layers.2.self_attn.q_proj.weight", "visual.proj.weight"]
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_proj.k_scale"]
    write_file(path, {**read_file(path), **{key: ("F32", [2], bytes(8)) for key in (*keys, *buffers)}})
    assert Checkpoint(olmoe).unused == keys


def test_a_config_that_claims_millions_of_experts_is_refused_soon(olmoe):
    changed(olmoe, num_hidden_layers=1024, num_experts=4096)
    path = olmoe / "model.safetensors"
    write_file(path, {key: tensor for key, tensor in read_file(path).items() if "gate.weight" not in key})
    assert refusal(ValueError, olmoe) == (
        f"{olmoe}: tensor model.layers.0.mlp.gate.weight is missing, and over 100,000 more; "
        "config.json and the weights do not belong together, or the download is not complete"
    )


# ---- the hub's cache


def cached(olmoe: Path, snapshots: dict[str, bool]) -> Path:
    """A folder of the hub's cache; snapshots by name, whether `main` names it."""
    root = olmoe.parent / "models--allenai--OLMoE"
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    for name, main in snapshots.items():
        (root / "snapshots" / name).mkdir(parents=True)
        for number, file in enumerate(sorted(olmoe.iterdir())):
            blob = root / "blobs" / f"{number:064x}"
            shutil.copy(file, blob)
            (root / "snapshots" / name / file.name).symlink_to(f"../../blobs/{blob.name}")
        if main:
            (root / "refs" / "main").write_text(name)
    return root


def test_a_folder_of_the_hubs_cache_is_its_snapshot(olmoe):
    root = cached(olmoe, {"aa11": False, "bb22": True})
    assert find_model(root) == root / "snapshots" / "bb22"
    assert Checkpoint(root).fingerprint() == Checkpoint(olmoe).fingerprint()


def test_snapshots_that_none_is_told_from_are_counted(olmoe):
    root = cached(olmoe, {"aa11": False, "bb22": False})
    assert refusal(FileNotFoundError, root) == (
        f"{root}: is a hub cache with 2 snapshots and none is main; name one of them"
    )
    shutil.rmtree(root / "snapshots" / "bb22")
    assert find_model(root) == root / "snapshots" / "aa11"
