"""The format: other programs read it, every part is where the tables say, and it says what it weighs."""

import json

import numpy as np
import pytest
from bundles import REFERENCE, weights_of
from golden_checkpoints import ARCHITECTURES

from edge_moe import _core
from edge_moe.compressor.pipeline import compress
from edge_moe.compressor.rounding.quantise import to_bfloat16
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.runtime.bundle import TRUNK_FILE, Bundle, parts_to_verify, verify
from edge_moe.runtime.bundle_table import table_checksum
from edge_moe.runtime.config import trunk_shapes
from edge_moe.runtime.describe import describe_bundle
from edge_moe.runtime.tensorfile import read_header

PACKED = [width for width in _core.WIDTHS if width < 16]


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- where things are


@pytest.mark.parametrize("name", [*ARCHITECTURES, "reference"])
def test_expert_data_starts_on_16_kib_and_records_fill_whole_blocks(bundle_of, name):
    bundle = Bundle.open(bundle_of(name, bits=16))
    alignment = bundle.table["experts"]["alignment"]
    assert alignment in (4096, 16384)
    spans = sorted((expert.offset, expert.nbytes) for expert in bundle.experts.values())
    assert spans[0][0] % 16384 == 0
    assert all(offset % alignment == 0 and nbytes % alignment == 0 for offset, nbytes in spans)
    for (offset, nbytes), (after, _) in zip(spans, spans[1:], strict=False):
        assert offset + nbytes == after
    assert sum(spans[-1]) == bundle.files[0].stat().st_size


@pytest.mark.parametrize("width", PACKED)
def test_trunk_parts_are_aligned_to_their_types(bundle_of, width):
    header = read_header(bundle_of("reference", width=4, trunk_width=width) / TRUNK_FILE)
    assert {tensor.dtype for tensor in header.values()} == {"F32", "U32", "BF16"}
    for tensor in header.values():
        assert tensor.offset % {"F32": 4, "U32": 4, "BF16": 2}[tensor.dtype] == 0
    assert min(tensor.offset for tensor in header.values()) % 64 == 0


def test_padding_is_zero(bundle_of):
    bundle = Bundle.open(bundle_of("olmoe", width=3))
    for expert in bundle.experts.values():
        nbytes = max(at + size for at, size in bundle.layouts[expert.layout].parts.values())
        record = np.fromfile(bundle.files[0], np.uint8, expert.nbytes, offset=expert.offset)
        assert len(record) > nbytes
        assert not record[nbytes:].any()


# ---- other programs


def test_the_safetensors_library_opens_every_file(bundle_of):
    safetensors = pytest.importorskip("safetensors")
    path = bundle_of("reference", width=4)
    bundle = Bundle.open(path)
    with safetensors.safe_open(bundle.files[0], "numpy") as file:
        assert set(file.keys()) == {f"layers.{layer}.experts.{index}" for layer, index in bundle.experts}
        for (layer, index), expert in bundle.experts.items():
            tensor = file.get_tensor(f"layers.{layer}.experts.{index}")
            assert tensor.dtype == np.uint8
            assert _core.crc32c_array(tensor) == expert.checksum
    with safetensors.safe_open(path / TRUNK_FILE, "numpy") as file:
        router = file.get_tensor("layers.0.router")
        assert file.get_slice("layers.0.q.scales").get_dtype() == "BF16"
    np.testing.assert_array_equal(router, Checkpoint(REFERENCE).trunk("layers.0.router"))


@pytest.mark.parametrize("width", PACKED)
def test_mlx_dequantises_the_trunk_as_it_lies_in_the_file(bundle_of, width):
    mx = pytest.importorskip("mlx.core")
    bundle = Bundle.open(bundle_of("reference", width=4, trunk_width=width))
    loaded = mx.load(str(bundle.path / TRUNK_FILE))
    raw = np.fromfile(bundle.path / TRUNK_FILE, np.uint8)
    for t in bundle.trunk:
        if t.width >= 16:
            continue
        codes, scales, biases = (loaded[f"{t.name}.{part}"] for part in ("codes", "scales", "biases"))
        # float32 scales that hold bfloat16 values keep MLX from rounding its result to bfloat16
        want = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), t.group, t.width)
        at, *of_scales = t.offsets
        ours = [raw[at:][: t.rows * t.cols * t.width // 8].reshape(t.rows, -1)]
        count = t.rows * t.cols // t.group
        ours += [raw[at : at + 2 * count].view(np.uint16).reshape(t.rows, -1) for at in of_scales]
        np.testing.assert_array_equal(_core.dequantise("scalar", *ours, t.width, t.cols), np.array(want))


@pytest.mark.parametrize("width", PACKED)
def test_mlx_dequantises_records_as_they_lie_in_the_file(bundle_of, width):
    mx = pytest.importorskip("mlx.core")
    bundle = Bundle.open(bundle_of("reference", width=width))
    for layer, index in [(0, 0), (3, 15)]:
        group = bundle.experts[layer, index].group
        for codes, scales, biases in weights_of(bundle.path).parts(layer, index):
            cols = codes.shape[1] * 8 // width
            floats = (mx.array(from_bfloat16(bits.view(np.uint16))) for bits in (scales, biases))
            want = mx.dequantize(mx.array(codes.view(np.uint32)), *floats, group, width)
            np.testing.assert_array_equal(
                _core.dequantise("scalar", codes, scales.view(np.uint16), biases.view(np.uint16), width, cols),
                np.array(want),
            )


def test_transformers_opens_the_bundle_for_its_config_and_tokenizer(bundle_of):
    transformers = pytest.importorskip("transformers")
    path = bundle_of("reference", width=4)
    assert transformers.AutoConfig.from_pretrained(path).num_experts == 16
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert tokenizer.decode(tokenizer("def main():")["input_ids"]) == "def main():"


# ---- what is in it


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_lossless_bundle_holds_the_checkpoint_bit_for_bit(bundle_of, golden, architecture):
    bundle = Bundle.open(bundle_of(architecture, bits=16))
    checkpoint = Checkpoint(golden[architecture][0])
    for key in bundle.experts:
        for (codes, *_), want in zip(weights_of(bundle.path).parts(*key), checkpoint.expert(*key), strict=True):
            np.testing.assert_array_equal(codes.view(np.uint16), to_bfloat16(want))
    header = read_header(bundle.path / TRUNK_FILE)
    assert list(trunk_shapes(bundle.config)) == [tensor.name for tensor in bundle.trunk]
    for tensor in bundle.trunk:
        dtype = {16: np.uint16, 32: np.float32}[tensor.width]
        count = tensor.rows * tensor.cols
        found = np.fromfile(bundle.path / TRUNK_FILE, dtype, count, offset=tensor.offsets[0])
        want = checkpoint.trunk(tensor.name).reshape(-1)
        np.testing.assert_array_equal(found, to_bfloat16(want) if tensor.width == 16 else want)
        assert header[tensor.name].offset == tensor.offsets[0]


def test_files_of_the_checkpoint_are_copied_verbatim(bundle_of):
    path = bundle_of("reference", width=4)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in path.iterdir()) == sorted(
        [*names, "bundle.json", "trunk.safetensors", "experts-00001-of-00001.safetensors"]
    )
    for name in names:
        assert (path / name).read_bytes() == (REFERENCE / name).read_bytes()


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path, golden):
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 160, 1024))
    for method in ("pmq", "rtn"):
        made = [
            compress(
                golden["qwen3_moe"][0],
                tmp_path / f"{method}{threads}",
                bits=8,
                method=method,
                calibration=[tmp_path / "ids.npy"],
                tokens=512,
                threads=threads,
            ).path
            for threads in (1, 2)
        ]
        files = [{file.name: file.read_bytes() for file in path.iterdir()} for path in made]
        assert files[0] == files[1]


def test_bits_per_weight_count_scales_biases_and_padding(bundle_of):
    bundle = Bundle.open(bundle_of("reference", width=4))
    on_disk = bundle.files[0].stat().st_size - min(expert.offset for expert in bundle.experts.values())
    assert bundle.expert_bytes == on_disk
    assert bundle.bits_per_weight == 8 * on_disk / (64 * 3 * 256 * 256) == 4.5  # no padding here
    assert bundle.nbytes == on_disk + (bundle.path / TRUNK_FILE).stat().st_size


def test_the_record_table_lists_every_expert_by_layer(bundle_of):
    bundle = Bundle.open(bundle_of("qwen2_moe", width=8))  # its layer 1 has no experts
    layouts, records, frequency = bundle.record_table()
    assert records.shape == (2 * 8, 5)
    assert len(layouts) == 1
    assert frequency.tolist() == [0.0] * 16
    first = bundle.experts[2, 0]
    assert records[8].tolist() == [0, first.offset, first.nbytes, first.checksum, 0]


def test_a_bundle_without_some_experts_holds_the_others_under_new_numbers(dropped_of, golden):
    bundle = Bundle.open(dropped_of("qwen2_moe", (16, 16, 16)))
    assert bundle.table["dropped"] == [[0, 3, 6], [1, 2, 4, 5]]
    assert bundle.table["top_k"] == [1, 2]
    config = bundle.config
    assert (config.experts, config.top_k, config.expert_count) == (8, 3, 9)
    assert [config.experts_of(layer) for layer in range(3)] == [5, 0, 4]
    assert [config.top_k_of(layer) for layer in range(3)] == [1, 0, 2]
    assert config.kept == ((1, 2, 4, 5, 7), (), (0, 3, 6, 7))
    assert list(bundle.experts) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (2, 0), (2, 1), (2, 2), (2, 3)]
    checkpoint = Checkpoint(golden["qwen2_moe"][0])
    routers = {tensor.name: tensor for tensor in bundle.trunk if tensor.name.endswith(".router")}
    for layer in config.moe_layers:
        router = routers[f"layers.{layer}.router"]
        found = np.fromfile(bundle.path / TRUNK_FILE, np.float32, router.rows * 64, offset=router.offsets[0]).reshape(
            -1, 64
        )
        want = checkpoint.trunk(router.name)
        assert [np.flatnonzero((want == row).all(1)).tolist() for row in found] == [[e] for e in config.kept[layer]]
    for layer, index in bundle.experts:
        want = checkpoint.expert(layer, config.kept[layer][index])
        for (codes, *_), weights in zip(weights_of(bundle.path).parts(layer, index), want, strict=True):
            np.testing.assert_array_equal(codes.view(np.uint16), to_bfloat16(weights))
    assert set(read_header(bundle.files[0])) == {f"layers.{layer}.experts.{index}" for layer, index in bundle.experts}
    assert sum(nbytes for _, nbytes in verify(bundle)) == bundle.nbytes + sum(bundle.copies.values())
    assert describe_bundle(bundle)["dropped"] == 7


def test_verify_reads_the_copies_the_trunk_and_every_record(bundle_of):
    bundle = Bundle.open(bundle_of("olmoe", width=4))
    parts = dict(verify(bundle))
    records = [f"layers.{layer}.experts.{index}" for layer in range(2) for index in range(8)]
    assert list(parts) == ["config.json", TRUNK_FILE, *records]
    assert sum(parts.values()) == bundle.nbytes + (bundle.path / "config.json").stat().st_size
    assert len(parts) == parts_to_verify(bundle)


def test_the_table_names_its_format_version_tool_and_checksum(bundle_of):
    table = json.loads((bundle_of("reference", width=4) / "bundle.json").read_text())
    assert (table["format"], table["version"]) == ("emoe", _core.FORMAT_VERSION)
    assert table["tool"].startswith("edge-moe ")
    assert table["method"] == {"name": "rtn"}
    assert table["calibration"] is table["certificate"] is None
    assert table["checksum"] == table_checksum(table)
    assert len(table["checksum"]) == 64
