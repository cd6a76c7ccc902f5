"""The safetensors container: reading a header with every claim checked, and laying out a file to write.

Used for checkpoints, the trunk and the expert files. What the tensors mean is not its business.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import check_values, pieces
from .model_path import check_pointer

NUMPY_DTYPES = {  # as read from disk; what numpy lacks is its bits
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}
FOUR_BITS = "F4"  # a type of two values in a byte, which numpy does not have
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes, from the start of the file
    nbytes: int


def read_header(path: Path, remedy: str = "download it again", most_bytes: int = MAX_HEADER_BYTES) -> dict[str, Stored]:
    """Read the tensors of a safetensors file, by name, from its header, which may have at most `most_bytes`.

    A file is 8 bytes of length, that much JSON, and the data that the JSON's offsets count from. Raises ValueError,
    ending in `remedy`, when the file is cut short, the header is damaged or tensors overlap.
    """
    file_bytes = path.stat().st_size
    head = b"".join(pieces(path, 0, 64))
    check_pointer(path, head)
    header_bytes = int.from_bytes(head[:8], "little")
    if not 2 <= header_bytes <= file_bytes - 8:
        raise ValueError(
            f"{path}: the header claims {header_bytes:,} bytes, the file has {file_bytes:,}; "
            f"it is cut short or not a safetensors file, {remedy}"
        )
    if header_bytes > most_bytes:
        raise ValueError(f"{path}: the header claims {header_bytes:,} bytes, expected at most {most_bytes:,}; {remedy}")
    text = b"".join(pieces(path, 8, header_bytes))
    check_values(path, text, remedy)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: the header is not valid JSON; {remedy}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a JSON object; {remedy}")
    start, data_bytes = 8 + header_bytes, file_bytes - 8 - header_bytes
    tensors, spans = {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype, shape, first, last = _parse_entry(path, key, entry, remedy)
        if last > data_bytes:
            raise ValueError(
                f"{path}: tensor {key} ends at byte {start + last:,}, the file has {file_bytes:,}; "
                f"it was cut short, {remedy}"
            )
        tensors[key] = Stored(path, dtype, shape, start + first, last - first)
        spans.append((first, last, key))
    spans.sort()
    for (_, end, key), (begin, _, after) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ValueError(f"{path}: tensors {key} and {after} overlap; {remedy}")
    return tensors


def _parse_entry(path: Path, key: str, entry, remedy: str) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's (dtype, shape, first byte, byte after the last). Raises ValueError if they disagree."""
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        good = isinstance(dtype, str) and all(type(x) is int and x >= 0 for x in (*shape, first, last))
        if good and (dtype in NUMPY_DTYPES or dtype == FOUR_BITS):
            good = last - first == bytes_of(dtype, shape)
        good = good and first <= last
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{path}: type, shape and offsets of tensor {key} do not agree; {remedy}")
    return dtype, shape, first, last


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """The size of a tensor's data."""
    if dtype == FOUR_BITS:
        return -(-math.prod(shape) // 2)
    return math.prod(shape) * NUMPY_DTYPES[dtype].itemsize


def make_header(tensors: list[tuple[str, str, tuple[int, ...], int]], alignment: int) -> bytes:
    """Make the header of a safetensors file: its length and JSON, padded so that the data is aligned to `alignment`.

    tensors: (name, dtype, shape, bytes) in the order of their data, which follows without gaps.
    """
    header, at = {}, 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
