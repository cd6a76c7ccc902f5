"""Decoding a checkpoint's tensors to float32: plain types, FP8 with block scales, MXFP4, and 4-bit integers.

A quantised tensor has values and, in another tensor, the scales that blocks of values share: w = value * scale.
  FP8    X.weight F8_E4M3 (rows, cols), X.weight_scale_inv or X.weight_scale (block rows, block cols). Despite its
         name, `_inv` is a factor too. Blocks at the last rows and columns may be incomplete.
  MXFP4  X.weight_packed U8 (rows, cols / 2), the low nibble first; X.weight_scale U8 (rows, cols / 32), an exponent.
         Or, of all experts, X_blocks U8 (experts, rows, cols / 32, 16), the low nibble first; X_scales U8 (experts,
         rows, cols / 32).
  INT4   X.weight_packed I32 (rows, cols / 8), the low nibble first, 8 is zero; X.weight_scale (rows, cols / group).
The names and types of the stored tensors tell the format; config.json's quantization_config has the block sizes. A few
rows are decoded at a time, so that little memory is needed beyond the float32 result.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from ...runtime.tensorfile import NUMPY_DTYPES, Stored

PLAIN = ("BF16", "F16", "F32")
FP8, MXFP4, INT4 = "F8_E4M3", "MXFP4", "INT4"
NIBBLES = (MXFP4, INT4)
EXPONENTS = ("U8", "F8_E8M0")  # a power of two, stored as its biased exponent
SCALES = {FP8: (*PLAIN, *EXPONENTS), MXFP4: EXPONENTS, INT4: PLAIN}
WHOLE = 0  # a block as high or wide as the matrix
BLOCKS = {FP8: (128, 128), MXFP4: (1, 32)}  # rows and columns that share a scale, unless config.json says otherwise
BLOCKS_SUFFIX = "_blocks"  # of a tensor of MXFP4 with a dimension for the blocks of a row
STEP_VALUES = 1 << 16  # values decoded at a time: codes and floats stay in the core's cache

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint as it is stored."""

    key: str  # the checkpoint's name for the values
    dtype: str  # BF16, F16, F32, F8_E4M3, MXFP4 or INT4
    shape: tuple[int, ...]  # decoded: (rows, cols), fused (experts, rows, cols), or a vector
    values: Stored
    scale_key: str = ""
    scales: Stored | None = None
    block: Block = (0, 0)


def scale_blocks(quantisation, where: str) -> tuple[Block, ...]:
    """The possible block sizes of FP8, given config.json's `quantization_config` or None.

    Raises ValueError for an unsupported method or an invalid size.
    """
    if quantisation is None:
        return _any_block([])
    if not isinstance(quantisation, dict):
        raise ValueError(f"{where}: quantization_config is {quantisation!r}, expected an object")
    method = quantisation.get("quant_method")
    if method == "mxfp4":
        return _any_block([])
    if method == "fp8":
        size = quantisation.get("weight_block_size")
        return _any_block([]) if size is None else (_block(size, "weight_block_size", where),)
    if method != "compressed-tensors":
        raise _unsupported(where, f"quantisation method {method!r}")
    if quantisation.get("transform_config"):
        raise _unsupported(where, "transform_config (rotated weights)")
    groups = quantisation.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise ValueError(f"{where}: config_groups is {groups!r}, expected an object")
    found = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        if weights.get("block_structure") is not None:
            found.append(_block(weights["block_structure"], "block_structure", where))
        elif type(weights.get("group_size")) is int and weights["group_size"] > 0:  # -1 is a whole row
            found.append((1, weights["group_size"]))
    return _any_block(found)


def locate(key: str, shape: tuple[int, ...], stored: dict[str, Stored], blocks: tuple[Block, ...]) -> Tensor | None:
    """Find a stored tensor and check its types and shapes; None if it is not stored in any format.

    key, shape: name and decoded shape of the matrix or vector. Raises ValueError for another shape, an unsupported
    type, or scales that are missing or do not fit.
    """
    values = stored.get(key)
    if values is None:
        packed = stored.get(f"{key}_packed")
        if packed is None:
            return None
        return (_locate_int4 if packed.dtype == "I32" else _locate_mxfp4)(key, shape, packed, stored)
    if values.dtype == "U8" and key.endswith(BLOCKS_SUFFIX):
        return _locate_blocks(key, shape, values, stored)
    if values.dtype not in (*PLAIN, FP8) or (values.dtype == FP8 and len(shape) < 2):
        raise _unsupported(values.path, f"tensor {key} of type {values.dtype}")
    _check_shape(key, values, shape)
    if values.dtype in PLAIN:
        return Tensor(key, values.dtype, shape, values)
    scale_key = f"{key}_scale" if f"{key}_scale" in stored else f"{key}_scale_inv"
    scales = _locate_scales(FP8, key, values, scale_key, stored)
    for block in blocks:
        if scales.shape in _scale_shapes(shape, block):
            return Tensor(key, FP8, shape, values, scale_key, scales, _resolve(block, shape))
    wanted = dict.fromkeys(str(_scale_shapes(shape, block)[0]) for block in blocks)
    raise _wrong_scales(scale_key, scales, key, shape, " or ".join(wanted))


def read(tensor: Tensor, first_row: int, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Read `shape` of a tensor as float32 from `first_row` on, where the rows of a fused tensor's experts are numbered
    consecutively.

    name: the canonical name, for errors. Raises ValueError for NaN or Inf, OSError if the file was truncated meanwhile.
    """
    if tensor.scales is None:
        values = _floats(tensor.key, tensor.values, first_row * shape[-1], math.prod(shape))
        _check_finite(values, tensor.key, tensor.values, name)
        return values.reshape(shape)
    rows, cols = shape
    blocks, first, count = _scale_span(tensor, first_row, rows)
    factors = _floats(tensor.scale_key, tensor.scales, first, count)
    _check_finite(factors, tensor.scale_key, tensor.scales, name)
    factors = factors.reshape(-1, -(-cols // tensor.block[1]))

    table = _table(tensor.dtype, pairs=tensor.dtype == FP8 and cols % 2 == 0)
    size, each = table.shape  # values that one code stands for
    codes = np.empty(max(STEP_VALUES // cols, 1) * cols // each, "u1" if size == 256 else "<u2")
    result = np.empty(shape, np.float32)
    step = codes.size * each // cols
    whole = cols // tensor.block[1]  # blocks that are not cut off
    edge = whole * tensor.block[1]
    with open(tensor.values.path, "rb", buffering=0) as file:
        file.seek(tensor.values.offset + first_row * cols * codes.itemsize // each)
        for row in range(0, rows, step):
            part = result[row : row + step]
            found = file.readinto(codes[: part.size // each])
            if found < part.size // each * codes.itemsize:
                done = row * cols + found // codes.itemsize * each
                raise _cut(tensor.key, tensor.values, done, rows * cols)
            np.take(table, codes[: part.size // each], axis=0, out=part.reshape(-1, each), mode="clip")
            scales = factors[blocks[row : row + step]]
            inner = part[:, :edge].reshape(len(part), whole, tensor.block[1])
            with np.errstate(over="ignore"):
                inner *= scales[:, :whole, None]
                part[:, edge:] *= scales[:, whole:]
            _check_finite(part, tensor.key, tensor.values, name)
    return result


def read_bytes(tensor: Tensor, first_row: int, shape: tuple[int, ...]) -> int:
    """Bytes on disk that read() takes, scales included."""
    count = math.prod(shape)
    if tensor.scales is None:
        return count * NUMPY_DTYPES[tensor.dtype].itemsize
    _, _, scales = _scale_span(tensor, first_row, shape[0])
    return (count // 2 if tensor.dtype in NIBBLES else count) + scales * NUMPY_DTYPES[tensor.scales.dtype].itemsize


# Finding and checking


def _any_block(found: list[Block]) -> tuple[Block, ...]:
    """The candidates that the shape of the scales decides between: one scale per tensor, per row, or per block."""
    return ((WHOLE, WHOLE), (1, WHOLE), *(dict.fromkeys(found) or (BLOCKS[FP8],)))


def _block(size, what: str, where: str) -> Block:
    if not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
        raise ValueError(f"{where}: {what} is {size!r}, expected two numbers of rows and columns above 0")
    return size[0], size[1]


def _resolve(block: Block, shape: tuple[int, ...]) -> Block:
    return block[0] or shape[-2], block[1] or shape[-1]


def _scale_shapes(shape: tuple[int, ...], block: Block) -> list[tuple[int, ...]]:
    """The shapes that the scales for one block size may have."""
    *experts, rows, cols = shape
    height, width = _resolve(block, shape)
    grid = (*experts, -(-rows // height), -(-cols // width))
    return [grid, (), (1,)] if grid == (1, 1) else [grid]


def _locate_mxfp4(key: str, shape: tuple[int, ...], packed: Stored, stored: dict[str, Stored]) -> Tensor:
    packed_key = f"{key}_packed"
    if packed.dtype != "U8" or len(shape) != 2:
        raise _unsupported(packed.path, f"tensor {packed_key} of type {packed.dtype}")
    return _mxfp4(packed_key, shape, packed, (shape[-1] // 2,), f"{key}_scale", stored)


def _locate_blocks(key: str, shape: tuple[int, ...], values: Stored, stored: dict[str, Stored]) -> Tensor:
    return _mxfp4(key, shape, values, (shape[-1] // 32, 16), f"{key.removesuffix(BLOCKS_SUFFIX)}_scales", stored)


def _mxfp4(
    key: str,
    shape: tuple[int, ...],
    values: Stored,
    row_shape: tuple[int, ...],
    scale_key: str,
    stored: dict[str, Stored],
) -> Tensor:
    """A tensor of MXFP4, each row of which is stored as `row_shape` bytes."""
    block = BLOCKS[MXFP4]
    if shape[-1] % block[1]:
        raise ValueError(
            f"{values.path}: tensor {key} is MXFP4, which has blocks of {block[1]} columns, and config.json "
            f"makes it {shape}; config.json and the weights do not belong together"
        )
    _check_shape(key, values, (*shape[:-1], *row_shape))
    scales = _locate_scales(MXFP4, key, values, scale_key, stored)
    wanted = _scale_shapes(shape, block)[0]
    if scales.shape != wanted:
        raise _wrong_scales(scale_key, scales, key, shape, str(wanted))
    return Tensor(key, MXFP4, shape, values, scale_key, scales, block)


def _locate_int4(key: str, shape: tuple[int, ...], packed: Stored, stored: dict[str, Stored]) -> Tensor:
    packed_key, scale_key = f"{key}_packed", f"{key}_scale"
    if len(shape) != 2 or shape[1] % 8 or f"{key}_zero_point" in stored or f"{key}_g_idx" in stored:
        raise _unsupported(packed.path, f"tensor {packed_key} of integers with zero points, or in another order")
    rows, cols = shape
    _check_shape(packed_key, packed, (rows, cols // 8))
    scales = _locate_scales(INT4, packed_key, packed, scale_key, stored)
    groups = scales.shape[1] if len(scales.shape) == 2 and scales.shape[0] == rows else 0
    if groups == 0 or cols % groups or cols // groups % 2:
        raise _wrong_scales(scale_key, scales, packed_key, shape, f"({rows}, groups of columns)")
    return Tensor(packed_key, INT4, shape, packed, scale_key, scales, (1, cols // groups))


def _locate_scales(dtype: str, key: str, values: Stored, scale_key: str, stored: dict[str, Stored]) -> Stored:
    if scale_key not in stored:
        raise ValueError(
            f"{values.path}: tensor {key} is {dtype} and its scales {scale_key} are missing; "
            "download the checkpoint again, or use the one that is not quantised"
        )
    scales = stored[scale_key]
    if scales.dtype not in SCALES[dtype]:
        raise _unsupported(scales.path, f"tensor {scale_key} of type {scales.dtype}")
    return scales


def _check_shape(key: str, found: Stored, shape: tuple[int, ...]) -> None:
    if found.shape != shape:
        raise ValueError(
            f"{found.path}: tensor {key} has shape {found.shape}, config.json makes it "
            f"{shape}; config.json and the weights do not belong together"
        )


def _wrong_scales(key: str, found: Stored, of: str, shape: tuple[int, ...], wanted: str) -> ValueError:
    return ValueError(
        f"{found.path}: tensor {key} has shape {found.shape}, expected {wanted}, the scales of {of} {shape}; "
        "config.json's quantization_config and the weights do not belong together"
    )


def _unsupported(where, what: str) -> ValueError:
    return ValueError(
        f"{where}: {what} is not supported; supported are {', '.join(PLAIN)}, FP8 (quant_method fp8 or "
        "compressed-tensors, F8_E4M3 with scales), MXFP4 (compressed-tensors, mxfp4-pack-quantized) and INT4 "
        "(compressed-tensors, pack-quantized, symmetric); use such a checkpoint, best the one that is not quantised"
    )


# Reading


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
    """Read `count` values from index `first` on, of a plain type or exponents, as float32 (count,)."""
    dtype = NUMPY_DTYPES[stored.dtype]
    values = np.fromfile(stored.path, dtype, count, offset=stored.offset + first * dtype.itemsize)
    if values.size < count:
        raise _cut(key, stored, values.size, count)
    if stored.dtype in EXPONENTS:
        return _table("F8_E8M0")[values, 0]
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


@cache
def _table(dtype: str, pairs: bool = False) -> np.ndarray:
    """The lookup table of a type, float32 (codes, values per code); with `pairs`, a code is two bytes.

    Looking up pairs takes half as many steps as bytes.
    """
    code = np.arange(256)
    if dtype == "F8_E8M0":  # OCP MX specification 1.0: 2 to the code less 127; 255 is NaN
        values = np.where(code == 255, np.nan, 2.0 ** (code - 127.0))
    elif dtype == INT4:  # offset by 8, the low nibble first
        values = np.stack([(code & 15) - 8.0, (code >> 4) - 8.0], axis=1)
    elif dtype == MXFP4:  # E2M1, the low nibble first
        value = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        value = np.concatenate([value, -value])
        values = np.stack([value[code & 15], value[code >> 4]], axis=1)
    else:  # E4M3 as in OCP's FP8 specification: bias 7, no Inf, all ones is NaN
        exponent, fraction = code >> 3 & 15, code & 7
        values = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
        values = np.where(code & 127 == 127, np.nan, np.where(code < 128, values, -values))
    values = values.astype(np.float32).reshape(256, -1)
    if pairs:  # little-endian: the first byte is the low one
        values = np.stack(np.broadcast_arrays(values.T, values), axis=2).reshape(-1, 2)
    return values
