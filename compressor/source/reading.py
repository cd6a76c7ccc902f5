"""Reading the tensors that formats.py found, as float32 or as they are stored.

A few rows are decoded at a time, so that little memory is needed beyond the float32 result.
"""

import math

import numpy as np

from ...runtime.tensorfile import NUMPY_DTYPES, Stored
from . import codes
from .formats import EXPONENTS, Tensor

FACTORS = {  # of the scales, from what a tensor stores for all of them, by the end of its name
    "weight_scale_2": lambda scales, stored: scales * stored,
    "weight_global_scale": lambda scales, stored: scales / stored,
    ".global_scale": lambda scales, stored: scales * (stored / np.float32(448 * 6)),  # MLX: the largest weight
}
STEP_VALUES = 1 << 16  # values decoded at a time: codes and floats stay in the core's cache
LARGEST_EXPONENT = 252  # of MXFP4 whose codes are kept: 12 times half of 2^(252 - 127) is still a float32


def read(tensor: Tensor, first_row: int, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Read `shape` of a tensor as float32 from `first_row` on, where the rows of a fused tensor's experts are numbered
    consecutively.

    name: the canonical name, for errors. Raises ValueError for NaN or Inf, OSError if the file was truncated meanwhile.
    """
    if not tensor.codes:
        values = _floats(tensor.key, tensor.values, first_row * shape[-1], math.prod(shape))
        _check_finite(values, tensor.key, tensor.values, name)
        return values.reshape(shape)
    rows, cols = shape
    scaling = _scales(tensor, first_row, shape, name) if tensor.scales is not None else None

    row_bytes = codes.packed_bytes(tensor.codes, cols)
    step = max(STEP_VALUES // cols, 1)
    packed = np.empty(step * row_bytes, "u1")
    result = np.empty(shape, np.float32)
    with open(tensor.values.path, "rb", buffering=0) as file:
        file.seek(tensor.values.offset + first_row * row_bytes)
        for row in range(0, rows, step):
            part = result[row : row + step]
            found = file.readinto(packed[: len(part) * row_bytes])
            if found < len(part) * row_bytes:
                raise _cut(tensor.key, tensor.values, row * cols + found * cols // row_bytes, rows * cols)
            codes.decode(tensor.codes, packed[: len(part) * row_bytes], part)
            if scaling:
                _scale(part, scaling[0][row : row + step], *scaling[1:], tensor.block[1])
            _check_finite(part, tensor.key, tensor.values, name)
    return result


def _scale(part: np.ndarray, blocks: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, width: int) -> None:
    """Multiply the values of some rows by their scales, and add their biases. blocks: each row's row of scales."""
    whole = part.shape[1] // width  # blocks that are not cut off
    edge = whole * width
    factors, inner = scales[blocks], part[:, :edge].reshape(len(part), whole, width)
    with np.errstate(over="ignore"):
        inner *= factors[:, :whole, None]
        part[:, edge:] *= factors[:, whole:]
        if biases is not None:  # blocks are whole
            inner += biases[blocks][:, :, None]


def read_codes(tensor: Tensor, first_row: int, rows: int, name: str) -> tuple[np.ndarray, ...]:
    """Read rows of a tensor in MXFP4, or in MLX's affine mode with scales in bfloat16, as they are stored.

    Returns codes, uint8 (rows, cols / 2), the low nibble first, and exponents, uint8 (rows, cols / 32); of MLX's codes,
    uint8 (rows, bytes), scales and biases, the bits of bfloat16 (rows, groups).

    Raises ValueError for an exponent beyond LARGEST_EXPONENT, and OSError if the file was truncated meanwhile.
    """
    cols = tensor.shape[-1]

    def bytes_of(key: str, stored: Stored, each: int) -> np.ndarray:
        values = np.fromfile(stored.path, np.uint8, rows * each, offset=stored.offset + first_row * each)
        if values.size < rows * each:
            raise _cut(key, stored, values.size, rows * each)
        return values.reshape(rows, each)

    if tensor.biases is not None:
        groups = 2 * cols // tensor.block[1]
        found = bytes_of(tensor.key, tensor.values, codes.packed_bytes(tensor.codes, cols))
        others = (tensor.scale_key, tensor.scales), (tensor.bias_key, tensor.biases)
        return found, *(bytes_of(*one, groups).view("<u2") for one in others)
    if tensor.scales is None:  # GGUF: an exponent, then the codes of values n and n + 16 in byte n
        blocks = bytes_of(tensor.key, tensor.values, cols // 32 * 17).reshape(rows, -1, 17)
        nibbles = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
        found = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).reshape(rows, -1), blocks[..., 0].copy()
    else:
        found = bytes_of(tensor.key, tensor.values, cols // 2), bytes_of(tensor.scale_key, tensor.scales, cols // 32)
    if (most := int(found[1].max())) > LARGEST_EXPONENT:
        key, stored = (tensor.scale_key, tensor.scales) if tensor.scales else (tensor.key, tensor.values)
        raise ValueError(
            f"{stored.path}: tensor {key} has the exponent {most}, expected at most {LARGEST_EXPONENT} "
            f"(read for {name}); the checkpoint is damaged, download it again"
        )
    return found


def read_bytes(tensor: Tensor, first_row: int, shape: tuple[int, ...]) -> int:
    """Bytes on disk that read() takes, scales included."""
    count = math.prod(shape)
    if not tensor.codes:
        return count * NUMPY_DTYPES[tensor.dtype].itemsize
    scales = _scale_span(tensor, first_row, shape[0])[2] if tensor.scales is not None else 0
    others = [(tensor.scales, scales), (tensor.biases, scales), (tensor.factor, 1)]
    others = sum(number * NUMPY_DTYPES[stored.dtype].itemsize for stored, number in others if stored is not None)
    return codes.packed_bytes(tensor.codes, count) + others


def _scales(tensor: Tensor, first_row: int, shape: tuple[int, int], name: str):
    """Read the scales of some rows: each row's row of scales, the scales (rows, cols) and the biases, or None."""
    blocks, first, count = _scale_span(tensor, first_row, shape[0])
    width = -(-shape[1] // tensor.block[1])

    def of_blocks(key: str, stored: Stored) -> np.ndarray:
        found = _floats(key, stored, first, count)
        _check_finite(found, key, stored, name)
        return found.reshape(-1, width)

    scales = of_blocks(tensor.scale_key, tensor.scales)
    if tensor.factor is not None:
        expert = first_row // tensor.shape[-2] if math.prod(tensor.factor.shape) > 1 else 0
        factor = _floats(tensor.factor_key, tensor.factor, expert, 1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scales = next(of for end, of in FACTORS.items() if tensor.factor_key.endswith(end))(scales, factor)
        _check_finite(scales, tensor.factor_key, tensor.factor, name)
    return blocks, scales, None if tensor.biases is None else of_blocks(tensor.bias_key, tensor.biases)


def _scale_span(tensor: Tensor, first_row: int, rows: int) -> tuple[np.ndarray, int, int]:
    """Locate the scales of some rows of one matrix: each row's row of scales, from 0; the index of the first scale; and
    the number of scales."""
    *_, matrix_rows, cols = tensor.shape
    height, width = tensor.block
    expert, top = divmod(first_row, matrix_rows)
    blocks = np.arange(top, top + rows) // height
    scale_cols = -(-cols // width)
    first = (expert * -(-matrix_rows // height) + int(blocks[0])) * scale_cols
    return blocks - blocks[0], first, (int(blocks[-1] - blocks[0]) + 1) * scale_cols


def _floats(key: str, stored: Stored, first: int, count: int) -> np.ndarray:
    """Read `count` values from index `first` on, of a plain type or of one byte, as float32 (count,)."""
    dtype = NUMPY_DTYPES[stored.dtype]
    values = np.fromfile(stored.path, dtype, count, offset=stored.offset + first * dtype.itemsize)
    if values.size < count:
        raise _cut(key, stored, values.size, count)
    if dtype.itemsize == 1:
        return codes.values("E8M0" if stored.dtype in EXPONENTS else "E4M3")[values]
    if stored.dtype == "BF16":  # the upper half of a float32
        values = values.astype(np.uint32)
        values <<= 16
        values = values.view(np.float32)
    return values.astype(np.float32, copy=False)


def _cut(key: str, stored: Stored, found: int, wanted: int) -> OSError:
    return OSError(
        f"{stored.path}: tensor {key} has {found:,} of {wanted:,} values; the file changed while in use, start again"
    )


def _check_finite(values: np.ndarray, key: str, stored: Stored, name: str) -> None:
    if not np.isfinite(values).all():
        raise ValueError(
            f"{stored.path}: tensor {key} has NaN or Inf (read for {name}); "
            "the checkpoint is damaged, download it again"
        )
