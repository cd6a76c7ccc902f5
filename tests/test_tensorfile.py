"""Safetensors headers: what is laid out is read back, and every damage has one error."""

import json

import numpy as np
import pytest

from edge_moe.runtime.tensorfile import MAX_HEADER_BYTES, make_header, read_header

TENSORS = [("a", "U8", (3, 5), 15), ("b", "BF16", (2, 2), 8), ("c", "F32", (), 4), ("empty", "U32", (0,), 0)]


def write(path, header, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("alignment", [64, 4096, 16384])
def test_what_is_laid_out_is_read_back_and_data_is_aligned(tmp_path, alignment):
    header = make_header(TENSORS, alignment)
    assert len(header) % alignment == 0
    (tmp_path / "x").write_bytes(header + bytes(range(27)))
    stored = read_header(tmp_path / "x")
    at = len(header)
    for name, dtype, shape, nbytes in TENSORS:
        tensor = stored[name]
        assert (tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes) == (dtype, shape, at, nbytes)
        at += nbytes


def test_the_safetensors_library_reads_the_same(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    values = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.arange(5, dtype=np.uint8)}
    header = make_header([("x", "F32", (3, 4), 48), ("y", "U8", (5,), 5)], 64)
    (tmp_path / "x").write_bytes(header + values["x"].tobytes() + values["y"].tobytes())
    loaded = safetensors.load_file(tmp_path / "x")
    assert loaded.keys() == values.keys()
    for name, array in values.items():
        np.testing.assert_array_equal(loaded[name], array)
    (tmp_path / "theirs").write_bytes(safetensors.save(values, {"made": "there"}))
    assert read_header(tmp_path / "theirs")["x"].shape == (3, 4)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_a_file_shorter_than_its_header_is_named(tmp_path, size):
    path = tmp_path / "x"
    path.write_bytes((100).to_bytes(8, "little")[:size] + b"{" * max(size - 8, 0))
    claimed = 100 if size else 0
    with pytest.raises(ValueError) as caught:
        read_header(path, "fetch it")
    assert str(caught.value) == (
        f"{path}: the header claims {claimed} bytes, the file has {size}; "
        "it is cut short or not a safetensors file, fetch it"
    )


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(ValueError, match="the header claims 100,000,001 bytes"):
        read_header(path)


def test_a_header_of_more_tensors_than_any_model_has_is_refused(tmp_path):
    """A million empty tensors have 60 MB in the file, and would take a gigabyte of memory."""
    empty = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"%d":%b' % (number, empty) for number in range(300_000)) + b"}"
    with pytest.raises(ValueError) as caught:
        read_header(write(tmp_path / "x", text))
    assert str(caught.value) == (
        f"{tmp_path}/x: has more than 2,000,000 values, which no such file needs; download it again"
    )


@pytest.mark.parametrize("text", [b"{ ", b"[1]", b"\xff\xfe", b'"a"', b"[" * 100_000, b'{"a": 1e'])
def test_a_header_that_is_no_object_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"x: the header is not (valid JSON|a JSON object); fetch it"):
        read_header(write(tmp_path / "x", text), "fetch it")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"dtype": "U8", "shape": [4]},
        {"dtype": "U8", "shape": [4], "data_offsets": [0]},
        {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 8]},
        {"dtype": "U8", "shape": [4], "data_offsets": [0, 5]},
        {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]},
        {"dtype": "U8", "shape": [-4], "data_offsets": [4, 0]},
        {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]},
        {"dtype": "U8", "shape": [4.0], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [True, 4], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
        {"dtype": 8, "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [4, 0]},
    ],
)
def test_an_entry_that_contradicts_itself_is_refused(tmp_path, entry):
    path = write(tmp_path / "x", {"t": entry}, bytes(8))
    with pytest.raises(ValueError) as caught:
        read_header(path, "fetch it")
    assert str(caught.value) == f"{path}: type, shape and offsets of tensor t do not agree; fetch it"


def test_a_tensor_past_the_end_is_named(tmp_path):
    header = {"t": {"dtype": "U8", "shape": [2**60], "data_offsets": [0, 2**60]}}
    path = write(tmp_path / "x", header, bytes(8))
    start = 8 + len(json.dumps(header))
    with pytest.raises(ValueError) as caught:
        read_header(path, "fetch it")
    assert str(caught.value) == (
        f"{path}: tensor t ends at byte {start + 2**60:,}, the file has {start + 8}; it was cut short, fetch it"
    )


def test_tensors_that_overlap_are_named(tmp_path):
    entries = {name: {"dtype": "U8", "shape": [4], "data_offsets": [at, at + 4]} for name, at in (("b", 0), ("a", 3))}
    path = write(tmp_path / "x", entries, bytes(8))
    with pytest.raises(ValueError) as caught:
        read_header(path, "fetch it")
    assert str(caught.value) == f"{path}: tensors b and a overlap; fetch it"


def test_unknown_types_and_metadata_are_let_through(tmp_path):
    entry = {"dtype": "F8_E5M2", "shape": [8], "data_offsets": [0, 8]}
    stored = read_header(write(tmp_path / "x", {"__metadata__": {"format": "pt"}, "t": entry}, bytes(8)))
    assert list(stored) == ["t"]
    assert stored["t"].dtype == "F8_E5M2"
