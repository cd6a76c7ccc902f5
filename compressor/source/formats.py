"""Finding the tensors of a checkpoint in every format in which they may be stored, and checking them.

A quantised tensor has codes (codes.py) and, in other tensors, the scales that blocks of them share: w = value * scale.
  FP8    X.weight F8_E4M3 (rows, cols), X.weight_scale_inv or X.weight_scale (block rows, block cols). Despite its
         name, `_inv` is a factor too. Blocks at the last rows and columns may be incomplete. MXFP8 has an exponent,
         U8 or F8_E8M0, for 32 columns. DeepSeek-V4 has X.scale F8_E8M0, an exponent, beside X.weight.
  MXFP4  X.weight_packed U8 (rows, cols / 2), E2M1; X.weight_scale U8 (rows, cols / 32), an exponent. Or, of all
         experts, X_blocks U8 (experts, rows, cols / 32, 16), X_scales U8 (experts, rows, cols / 32). Or, of
         DeepSeek-V4's experts, X.weight I8 (rows, cols / 2) or F4 (rows, cols); X.scale F8_E8M0 (rows, cols / 32).
  NVFP4  X.weight_packed U8 (rows, cols / 2), E2M1; X.weight_scale F8_E4M3 (rows, cols / 16), over
         X.weight_global_scale. ModelOpt has X.weight and X.weight_scale_2 instead, which is a factor.
  INT    X.weight_packed I32 (rows, cols * bits / 32), bits 4 or 8, zero in the middle; X.weight_scale (rows, groups).
  GGUF   blocks of codes with their scales, of any type that the package gguf knows.
  MLX    X.weight U32 (..., cols * bits / 32), X.scales and, in mode affine, X.biases (..., groups): w = code * scale +
         bias. The other modes have no biases and the codes and scales of MXFP4, MXFP8 and NVFP4.
The names, types and shapes of the stored tensors tell the format; quantisation.py has what config.json says of block
sizes, and reading.py decodes what is found here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...runtime.tensorfile import FOUR_BITS, Stored
from . import codes
from .quantisation import MX_BLOCK, PLAIN, Block, unsupported

FP8, MXFP4, NVFP4 = "F8_E4M3", "MXFP4", "NVFP4"
INTEGERS = ("I32", "I64")
EXPONENTS = ("U8", "F8_E8M0")  # a power of two, stored as its biased exponent
SCALES = {FP8: (*PLAIN, *EXPONENTS), MXFP4: EXPONENTS, NVFP4: (FP8,), "INT4": PLAIN, "INT8": PLAIN}
PACKED_FP4 = ("I8", FOUR_BITS)  # two codes in a byte; of the second, the shape counts codes
BLOCKS_SUFFIX = "_blocks"  # of a tensor of MXFP4 with a dimension for the blocks of a row
NVFP4_BLOCK = (1, 16)
MLX_BITS = (2, 3, 4, 5, 6, 8)  # of mode affine
MLX_MODES = {(4, 32): (MXFP4, "E2M1", "U8"), (8, 32): (FP8, "E4M3", "U8"), (4, 16): (NVFP4, "E2M1", FP8)}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint as it is stored."""

    key: str  # the checkpoint's name for the values
    dtype: str  # BF16, F16, F32, F8_E4M3, MXFP4, NVFP4, INT4, INT8, MLX2 to MLX8, or a type of GGUF's
    shape: tuple[int, ...]  # decoded: (rows, cols), fused (experts, rows, cols), or a vector
    values: Stored
    codes: str = ""  # the kind of codes, as for codes.values(), of a quantised tensor
    scale_key: str = ""
    scales: Stored | None = None
    block: Block = (0, 0)
    bias_key: str = ""
    biases: Stored | None = None  # as many as scales
    factor_key: str = ""
    factor: Stored | None = None  # one for all scales, or one for each expert
    second: "Tensor | None" = None  # another one that has a part of what is read, as Source.second says

    def parts(self) -> Iterator[tuple[str, Stored]]:
        """All that is stored of it, by name."""
        yield self.key, self.values
        others = (self.scale_key, self.scales), (self.bias_key, self.biases), (self.factor_key, self.factor)
        yield from ((key, stored) for key, stored in others if stored is not None)
        if self.second:
            yield from self.second.parts()


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
        return (_locate_ints if packed.dtype == "I32" else _locate_fp4)(key, f"{key}_packed", shape, packed, stored)
    if values.dtype == "U8" and key.endswith(BLOCKS_SUFFIX):
        return _fp4(
            MXFP4, key, shape, values, (shape[-1] // 32, 16), f"{key.removesuffix(BLOCKS_SUFFIX)}_scales", stored
        )
    if values.dtype in PACKED_FP4 and (scale_key := _scale_key(key, stored)) in stored and len(shape) > 1:
        each = shape[-1] // 2 if values.dtype == "I8" else shape[-1]
        return _fp4(MXFP4, key, shape, values, (each,), scale_key, stored)
    if values.dtype == "U8" and f"{key}_scale_2" in stored:
        return _locate_fp4(key, key, shape, values, stored)
    if values.dtype == "U32" and f"{key.removesuffix('weight')}scales" in stored and len(shape) > 1:
        return _locate_mlx(key, shape, values, stored)
    if values.dtype.startswith(codes.GGML):
        return _locate_ggml(key, shape, values)
    if values.dtype not in (*PLAIN, FP8) or (values.dtype == FP8 and len(shape) < 2):
        raise unsupported(values.path, f"tensor {key} of type {values.dtype}")
    _check_shape(key, values, shape)
    if values.dtype in PLAIN:
        return Tensor(key, values.dtype, shape, values)
    scale_key = _scale_key(key, stored)
    scales = _locate_scales(FP8, key, values, scale_key, stored)
    for block in blocks:
        if scales.shape in _scale_shapes(shape, block):
            return Tensor(key, FP8, shape, values, "E4M3", scale_key, scales, _resolve(block, shape))
    wanted = dict.fromkeys(str(_scale_shapes(shape, block)[0]) for block in blocks)
    raise _wrong_scales(scale_key, scales, key, shape, " or ".join(wanted))


def _scale_key(key: str, stored: dict[str, Stored]) -> str:
    """The name of the scales of a tensor, in whichever spelling is stored; else the usual one."""
    names = f"{key}_scale", f"{key.removesuffix('.weight')}.scale"
    return next((name for name in names if name in stored), f"{key}_scale_inv")


def locate_integers(key: str, shape: tuple[int, ...], stored: dict[str, Stored]) -> Tensor | None:
    """The same for a tensor of whole numbers."""
    values = stored.get(key)
    if values is not None and values.dtype not in INTEGERS:
        raise unsupported(values.path, f"tensor {key} of type {values.dtype} in place of {' or '.join(INTEGERS)}")
    if values is not None:
        _check_shape(key, values, shape)
    return None if values is None else Tensor(key, values.dtype, shape, values)


def _resolve(block: Block, shape: tuple[int, ...]) -> Block:
    return block[0] or shape[-2], block[1] or shape[-1]


def _scale_shapes(shape: tuple[int, ...], block: Block) -> list[tuple[int, ...]]:
    """The shapes that the scales for one block size may have."""
    *experts, rows, cols = shape
    height, width = _resolve(block, shape)
    grid = (*experts, -(-rows // height), -(-cols // width))
    return [grid, (), (1,)] if grid == (1, 1) else [grid, grid[:-1]] if block == (1, 0) else [grid]


def _locate_fp4(key: str, packed_key: str, shape: tuple[int, ...], packed: Stored, stored: dict[str, Stored]) -> Tensor:
    """MXFP4 or NVFP4: two codes of E2M1 in a byte."""
    scale_key, factor_key = f"{key}_scale", f"{key}_scale_2" if packed_key == key else f"{key}_global_scale"
    found = stored.get(scale_key)
    dtype = NVFP4 if packed_key == key or (found and found.dtype == FP8) else MXFP4
    if packed.dtype != "U8" or len(shape) != 2:
        raise unsupported(packed.path, f"tensor {packed_key} of type {packed.dtype}")
    tensor = _fp4(dtype, packed_key, shape, packed, (shape[-1] // 2,), scale_key, stored)
    return _with_factor(tensor, factor_key, stored) if dtype == NVFP4 else tensor


def _fp4(
    dtype: str,
    key: str,
    shape: tuple[int, ...],
    values: Stored,
    row_shape: tuple[int, ...],
    scale_key: str,
    stored: dict[str, Stored],
) -> Tensor:
    """A tensor of E2M1, each row of which is stored as `row_shape` bytes."""
    block = NVFP4_BLOCK if dtype == NVFP4 else MX_BLOCK
    if shape[-1] % block[1]:
        raise ValueError(
            f"{values.path}: tensor {key} is {dtype}, which has blocks of {block[1]} columns, and config.json "
            f"makes it {shape}; config.json and the weights do not belong together"
        )
    _check_shape(key, values, (*shape[:-1], *row_shape))
    scales = _locate_scales(dtype, key, values, scale_key, stored)
    wanted = _scale_shapes(shape, block)[0]
    if scales.shape != wanted:
        raise _wrong_scales(scale_key, scales, key, shape, str(wanted))
    return Tensor(key, dtype, shape, values, "E2M1", scale_key, scales, block)


def _locate_ints(
    key: str, packed_key: str, shape: tuple[int, ...], packed: Stored, stored: dict[str, Stored]
) -> Tensor:
    """Whole numbers of 4 or 8 bits."""
    scale_key, cols = f"{key}_scale", shape[-1]
    bits = 8 if packed.shape[-1:] == (cols // 4,) else 4
    if len(shape) != 2 or cols % (32 // bits) or f"{key}_zero_point" in stored or f"{key}_g_idx" in stored:
        raise unsupported(packed.path, f"tensor {packed_key} of integers with zero points, or in another order")
    rows = shape[0]
    _check_shape(packed_key, packed, (rows, cols * bits // 32))
    dtype = f"INT{bits}"
    scales = _locate_scales(dtype, packed_key, packed, scale_key, stored)
    block = (1, _group(scale_key, scales, packed_key, shape))
    return Tensor(packed_key, dtype, shape, packed, f"S{bits}", scale_key, scales, block)


def _locate_mlx(key: str, shape: tuple[int, ...], packed: Stored, stored: dict[str, Stored]) -> Tensor:
    """A tensor that MLX quantised, in any of its modes, with the bits and groups that its shape tells."""
    name, (*others, cols) = key.removesuffix("weight"), shape
    words = packed.shape[-1] if packed.shape[:-1] == tuple(others) else 0
    bits = next((bits for bits in MLX_BITS if words * 32 == bits * cols), 0)
    if not bits:
        wanted = f"{(*others, cols)} in words of codes of {', '.join(map(str, MLX_BITS))} bits"
        raise ValueError(
            f"{packed.path}: tensor {key} has shape {packed.shape}, config.json makes it {wanted}; "
            "config.json and the weights do not belong together"
        )
    scale_key, bias_key, factor_key = f"{name}scales", f"{name}biases", f"{name}global_scale"
    scales, biases = stored[scale_key], stored.get(bias_key)
    group = _group(scale_key, scales, key, shape)
    if biases is not None and scales.dtype in PLAIN and biases.dtype in PLAIN:
        _check_shape(bias_key, biases, scales.shape)
        rest = (scale_key, scales, (1, group), bias_key, biases)
        return Tensor(key, f"MLX{bits}", shape, packed, f"U{bits}", *rest)
    mode = MLX_MODES.get((bits, group)) if scales.dtype == "U8" and biases is None else None
    if mode is None:
        what = f"tensor {key} of {bits} bits in groups of {group} with {scale_key} of type {scales.dtype}"
        raise unsupported(packed.path, what + " and no biases" * (biases is None))
    dtype, kind, scale_dtype = mode
    scales = replace(scales, dtype=scale_dtype)
    tensor = Tensor(key, dtype, shape, packed, kind, scale_key, scales, (1, group))
    return _with_factor(tensor, factor_key, stored) if factor_key in stored else tensor


def _locate_ggml(key: str, shape: tuple[int, ...], values: Stored) -> Tensor:
    """A tensor of a GGUF file."""
    weights, _ = codes.ggml_block(values.dtype)
    if len(shape) < 2 or shape[-1] % weights:
        raise unsupported(values.path, f"tensor {key} {shape} of type {values.dtype.removeprefix(codes.GGML)}")
    _check_shape(key, values, shape)
    return Tensor(key, values.dtype.removeprefix(codes.GGML), shape, values, values.dtype)


def _with_factor(tensor: Tensor, factor_key: str, stored: dict[str, Stored]) -> Tensor:
    """The tensor with the factor of all its scales, or of those of each expert."""
    if factor_key not in stored:
        raise ValueError(
            f"{tensor.values.path}: tensor {tensor.key} is {tensor.dtype} and {factor_key} is missing; "
            "download the checkpoint again, or use the one that is not quantised"
        )
    factor = stored[factor_key]
    if factor.dtype not in PLAIN:
        raise unsupported(factor.path, f"tensor {factor_key} of type {factor.dtype}")
    wanted = (math.prod(tensor.shape[:-2]),) if len(tensor.shape) > 2 else (1,)
    if math.prod(factor.shape) != 1 and factor.shape != wanted:
        raise _wrong_scales(factor_key, factor, tensor.key, tensor.shape, str(wanted))
    return replace(tensor, factor_key=factor_key, factor=factor)


def _group(key: str, scales: Stored, of: str, shape: tuple[int, ...]) -> int:
    """The columns that share a scale, in groups within a row."""
    *others, cols = shape
    groups = scales.shape[-1] if scales.shape[:-1] == tuple(others) else 0
    if groups == 0 or cols % groups or cols // groups % 2:
        raise _wrong_scales(key, scales, of, shape, f"({', '.join(map(str, others))}, groups of columns)")
    return cols // groups


def _locate_scales(dtype: str, key: str, values: Stored, scale_key: str, stored: dict[str, Stored]) -> Stored:
    if scale_key not in stored:
        raise ValueError(
            f"{values.path}: tensor {key} is {dtype} and its scales {scale_key} are missing; "
            "download the checkpoint again, or use the one that is not quantised"
        )
    scales = stored[scale_key]
    if scales.dtype not in SCALES[dtype]:
        raise unsupported(scales.path, f"tensor {scale_key} of type {scales.dtype}")
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
