"""compress(): targets are kept, bad input has one clear error, and nothing half-written is ever left."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE
from test_checkpoint import read_file, shard, write_file
from test_checkpoint_formats import SUPPORTED

from edge_moe.compressor.pipeline import compress
from edge_moe.runtime.bundle import Bundle
from edge_moe.runtime.config_file import ARCHITECTURES


@pytest.fixture(scope="module")
def ids_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(0, 128, 2048))
    return file


@pytest.fixture
def model(golden, tmp_path):
    """The test's own copy of a checkpoint without a tokenizer: 2 layers of 6 experts, 18,432 weights each."""
    return Path(shutil.copytree(golden["qwen3_moe"][0], tmp_path / "model"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out" / "new.emoe"


def refused(model, out, error=ValueError, **options) -> str:
    """The text of compress()'s error, after which nothing may be left of `out`."""
    with pytest.raises(error) as caught:
        compress(model, out, **options)
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    return str(caught.value)


def directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


# ---- targets


@pytest.mark.parametrize("method", ["pmq", "mc", "uniform", "rtn"])
@pytest.mark.parametrize("bits", [4.5, 5.5])
def test_the_mean_bits_are_at_most_what_was_asked_and_close_to_it(model, out, ids_file, method, bits):
    bundle = compress(model, out, bits=bits, method=method, calibration=ids_file, tokens=512)
    assert bundle.bits_per_weight <= bits
    if method == "pmq":  # one page of 4 KiB more for one expert is 0.15 bits of the mean
        assert bundle.bits_per_weight > bits - 0.3
    widths = {width for expert in bundle.experts.values() for width in expert.widths}
    assert widths <= {1, 2, 3} if method == "mc" else len(widths) == 1 or method == "pmq"
    assert bundle.table["method"]["name"] == method
    assert {expert.group for expert in bundle.experts.values()} == {32}  # all that fits
    assert (bundle.table["calibration"] is None) == (method == "rtn")


@pytest.mark.parametrize("method", ["pmq", "uniform"])
@pytest.mark.parametrize("size", [210_000, "250kB"])
def test_a_size_is_of_the_whole_directory(model, out, ids_file, method, size):
    compress(model, out, size=size, method=method, calibration=[ids_file], tokens=512, trunk_width=4)
    assert directory_bytes(out) <= (210_000 if size == 210_000 else 250_000)


@pytest.mark.parametrize("width", [1, 5, 16])
def test_one_width_holds_for_every_expert_and_leaves_the_trunk_at_8(model, out, width):
    bundle = compress(model, out, width=width, method="rtn")
    assert {expert.widths for expert in bundle.experts.values()} == {(width,) * 3}
    assert {tensor.width for tensor in bundle.trunk} == {8, 32}


def test_calibration_is_written_down_with_every_experts_frequency(model, out, ids_file):
    bundle = compress(model, out, bits=5, calibration=[ids_file], tokens=1024, seed=3)
    calibration = bundle.table["calibration"]
    assert (calibration["source"], calibration["tokens"], calibration["seed"]) == ("ids.npy", 1024, 3)
    for layer in (0, 1):
        total = sum(bundle.experts[layer, index].frequency for index in range(6))
        assert total == pytest.approx(3, abs=1e-5)  # top_k; each is rounded to 6 digits


def test_the_allocation_is_better_than_one_width_by_its_own_measure(golden, tmp_path, ids_file):
    """Where experts differ a lot: one of them gets weights a hundred times as large."""
    model = Path(shutil.copytree(golden["qwen3_moe"][0], tmp_path / "model"))
    tensors = read_file(model / "model.safetensors")
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    dtype, shape, data = tensors[name]
    large = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32) * 100
    tensors[name] = dtype, shape, (large.view(np.uint32) >> 16).astype("<u2").tobytes()
    write_file(model / "model.safetensors", tensors)
    bundle = compress(model, tmp_path / "new.emoe", bits=4, calibration=ids_file, tokens=512)
    others = [sum(e.widths) for key, e in bundle.experts.items() if key != (0, 2) and key[0] == 0]
    assert sum(bundle.experts[0, 2].widths) > np.mean(others)


def test_progress_runs_from_the_first_to_the_last_piece_of_each_step(model, out, ids_file):
    seen = {}
    compress(
        model,
        out,
        bits=4,
        calibration=ids_file,
        tokens=512,
        progress=lambda *now: seen.setdefault(now[0], []).append(now[1:]),
    )
    assert list(seen) == ["measure", "round"]
    for steps in seen.values():
        done = [step for step, _ in steps]
        assert done == sorted(done)
        assert done[-1] == steps[-1][1]


def test_a_checkpoint_without_a_tokenizer_needs_token_ids_or_no_calibration(model, out, ids_file, tmp_path):
    (tmp_path / "text.txt").write_text("words " * 2000)
    assert refused(model, out, bits=5) == (
        "the checkpoint has no tokenizer.json; pass --calibration IDS.npy, or use --method rtn"
    )
    assert refused(model, out, bits=5, calibration=[tmp_path / "text.txt"]) == (
        f"{tmp_path / 'text.txt'}: the checkpoint has no tokenizer.json; pass token ids as .npy"
    )
    compress(model, out, bits=5, calibration=[ids_file], tokens=256)
    compress(model, out.with_name("rtn.emoe"), bits=5, method="rtn")


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.5}, "bits is 0.5, expected 3.56 to 16 (experts of width 1 take 3.56)"),
        ({"bits": 17}, "bits is 17, expected 3.56 to 16 (experts of width 1 take 3.56)"),
        ({"bits": float("nan")}, "bits is nan, expected 3.56 to 16 (experts of width 1 take 3.56)"),
        ({"width": 7, "method": "rtn"}, "width is 7, expected one of 1, 2, 3, 4, 5, 6, 8, 16"),
        (
            {"width": 4},
            "width is one width for all experts; method pmq chooses widths, give bits instead",
        ),
        ({"bits": 4, "size": 10**9}, "bits, width and size exclude each other; give one of them"),
        ({"method": "best"}, "method is 'best', expected one of pmq, mc, mc-release, uniform, rtn, keep"),
        ({"bits": 5, "group": 16}, "group is 16, expected one of 32, 64, 128"),
        ({"bits": 5, "trunk_width": 32}, "trunk_width is 32, expected one of 1, 2, 3, 4, 5, 6, 8, 16"),
        ({"bits": 5, "tokens": 0}, "tokens is 0, expected at least 256"),
        ({"size": "8XB"}, "size '8XB' is not understood; write 8GB, 8GiB, 500MB or a number of bytes"),
        ({"bits": 5, "calibration": "gone.txt"}, "gone.txt: no such file of calibration or held-out text"),
    ],
)
def test_options_that_cannot_be_are_refused(model, out, options, message):
    assert refused(model, out, error=(ValueError, FileNotFoundError), **options) == message


@pytest.mark.parametrize("method", ["pmq", "mc", "uniform"])
def test_a_size_below_the_smallest_bundle_is_refused_with_one_that_works(model, out, ids_file, method):
    message = refused(model, out, size="1KB", method=method, calibration=ids_file)
    least, experts, rest = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", message)[-3:])
    assert message == (
        f"size is 1,000 bytes, expected at least {least:,}: {experts:,} for experts of width 1 and {rest:,} for the "
        "rest; raise it, lower trunk_width, or drop experts"
    )
    assert (least, experts) == (experts + rest, 2 * 6 * 8192)
    if method != "mc":  # which needs an expert of width 3 and one of width 2
        compress(model, out, size=least, method=method, calibration=ids_file, tokens=256)
        assert directory_bytes(out) <= least


def test_an_option_that_is_not_there_is_refused(model, out):
    assert "unexpected keyword argument 'bit'" in refused(model, out, error=TypeError, bit=4)


def test_what_is_there_already_is_kept(model, tmp_path):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(FileExistsError) as caught:
        compress(model, tmp_path / "there", method="rtn", bits=5)
    assert str(caught.value) == f"{tmp_path / 'there'}: exists already; choose another name or remove it"
    assert (tmp_path / "there").read_text() == "mine"


# ---- checkpoints


def edit_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def test_an_architecture_that_is_not_supported_is_named(model, out):
    edit_config(model, model_type="llama")
    assert refused(model, out) == (
        f"{model}/config.json: architecture 'llama' is not supported; supported are {', '.join(ARCHITECTURES)}"
    )


def test_a_model_that_is_not_there_is_named(tmp_path, out):
    assert refused(tmp_path / "gone", out, error=FileNotFoundError) == (
        f"{tmp_path}/gone/config.json: no such file; a model directory has a config.json"
    )


def test_a_missing_shard_is_named(model, out):
    names = shard(model, 3)
    (model / names[1]).unlink()
    assert refused(model, out, error=FileNotFoundError) == (
        f"{model / names[1]}: no such file, the only one of the 3 shards that model.safetensors.index.json names "
        "that is missing; download it"
    )


def test_a_shard_cut_anywhere_is_refused(model, out):
    file = model / shard(model, 2)[1]
    whole = file.read_bytes()
    for cut in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert refused(model, out, method="rtn", bits=5).startswith(f"{file}: ")


def test_a_tensor_of_another_shape_or_type_is_named(model, out):
    tensors = read_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    dtype, (hidden, dim), data = tensors[name]
    write_file(model / "model.safetensors", {**tensors, name: (dtype, [dim, hidden], data)})
    assert refused(model, out) == (
        f"{model}/model.safetensors: tensor {name} has shape ({dim}, {hidden}), "
        f"config.json makes it ({hidden}, {dim}); config.json and the weights do not belong together"
    )
    write_file(model / "model.safetensors", {**tensors, name: ("U8", [hidden, dim], data[: len(data) // 2])})
    assert refused(model, out) == (f"{model}/model.safetensors: tensor {name} of type U8 is not supported; {SUPPORTED}")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts.4.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("method", ["rtn", "uniform", "pmq"])
def test_a_weight_that_is_not_a_number_is_named_and_no_bundle_is_left(model, out, ids_file, name, method):
    tensors = read_file(model / "model.safetensors")
    dtype, shape, data = tensors[name]
    bad = np.frombuffer(data, "<u2").copy()
    bad[-1] = 0x7FC0
    write_file(model / "model.safetensors", {**tensors, name: (dtype, shape, bad.tobytes())})
    with pytest.raises(ValueError) as caught:
        compress(model, out, bits=5, method=method, calibration=ids_file, tokens=256)
    assert not out.exists()
    assert out.parent.exists() == (method != "rtn")  # where layer 0 was done before, it can be gone on with
    canonical = "output_norm" if "norm" in name else "layers.1.experts.4.up"
    assert str(caught.value) == (
        f"{model}/model.safetensors: tensor {name} has NaN or Inf (read for {canonical}); "
        "the checkpoint is damaged, download it again"
    )


# ---- stopped on the way


@pytest.mark.parametrize(("method", "step"), [("pmq", "measure"), ("uniform", "round"), ("rtn", "quantise")])
def test_an_interrupt_before_any_layer_is_done_leaves_nothing(model, out, ids_file, method, step):
    def stop(now: str, done: int, of: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    options = {"bits": 5, "method": method, "calibration": ids_file, "tokens": 256}
    refused(model, out, error=KeyboardInterrupt, progress=stop, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_while_quantising_leaves_nothing(tmp_path):
    code = """
import sys
from edge_moe import compress
def tell(step, done, of):
    if step == "quantise" and done == of // 2:
        print("half", flush=True)
        sys.stdin.readline()  # until the signal comes
compress(sys.argv[1], sys.argv[2], method="rtn", bits=4.5, progress=tell)
"""
    out = tmp_path / "out" / "new.emoe"
    command = [sys.executable, "-c", code, str(REFERENCE), str(out)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as child:
        assert child.stdout.readline() == "half\n"
        assert {file.name for file in out.parent.iterdir()} == {"new.emoe.partial", "new.emoe.work"}
        os.kill(child.pid, signal.SIGINT)
        _, errors = child.communicate()
    assert child.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not out.parent.exists()
    assert Bundle.open(compress(REFERENCE, out, method="rtn", bits=4.5).path).bits_per_weight == 4.5
