"""Quantising a float32 matrix to codes, scales and biases, and back.

The search for scales is compiled (src/quantise.cpp); this module calls it, and refuses what cannot be packed.
"""

import numpy as np

from ... import _core
from ...runtime.config import stays_float
from ..writing.writer import Packing, Quantised

MOST = 1e37  # the largest weight that can be packed


def quantise(
    weights: np.ndarray,
    width: int,
    group: int,
    *,
    importance: np.ndarray | None = None,
    search: bool = True,
    threads: int = 1,
) -> Quantised:
    """Pack a float32 matrix (rows, cols), or keep it as bfloat16 (width 16) or float32 (width 32).

    importance: float32 (cols,), the weight of each input's squared error; None weights all equally. search: try several
    ranges for each group and refine by least squares; off is plain round to nearest. Raises ValueError for weights
    beyond MOST, whose range float32 cannot hold.
    """
    if width == 32:
        return Quantised(np.ascontiguousarray(weights, np.float32))
    if not len(weights):
        return no_rows(width, group, weights.shape[1])
    if width == 16:
        codes = to_bfloat16(weights)
        if ((codes & 0x7FFF) == 0x7F80).any():  # it became Inf
            most = max(-weights.min(), weights.max())
            raise ValueError(f"a weight of {most:.6g} is beyond bfloat16; use another checkpoint")
        return Quantised(codes)
    if (most := max(-weights.min(), weights.max())) > MOST:
        raise ValueError(f"a weight of {most:.3g} is beyond {MOST:.0e}, which width {width} cannot hold; use bits 16")
    codes, scales, biases = _core.quantise_matrix(
        np.ascontiguousarray(weights, np.float32), width, group, importance, search=search, threads=threads
    )
    return Quantised(codes, scales, biases)


def no_rows(width: int, group: int, cols: int) -> Quantised:
    """A packed matrix without rows, as of a gate that is not there."""
    if width == 16:
        return Quantised(np.zeros((0, cols), np.uint16))
    groups = np.zeros((0, cols // group), np.uint16)
    return Quantised(np.zeros((0, cols * width // 8), np.uint8), groups, groups)


def dequantise(packed: Quantised, width: int, cols: int) -> np.ndarray:
    """Convert a packed matrix to float32 (rows, cols)."""
    if width == 32:
        return packed.codes
    if not len(packed.codes):
        return np.zeros((0, cols), np.float32)
    if width == 16:
        return from_bfloat16(packed.codes)
    if packed.biases is None:
        none = np.zeros((0, 0), np.uint16)
        return _core.dequantise("scalar", packed.codes, none, none, width, cols, packed.scales)
    return _core.dequantise("scalar", packed.codes, packed.scales, packed.biases, width, cols)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), round to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def largest_group(most: int, *cols: int) -> int | None:
    """The largest group up to `most` that divides all of `cols`, or None."""
    return max((g for g in _core.GROUPS if g <= most and not any(n % g for n in cols)), default=None)


def trunk_packing(shapes: dict[str, tuple[int, ...]], width: int, group: int) -> dict[str, Packing]:
    """The packing of each trunk tensor: float32 for those that stays_float() names, other matrices at `width`.

    A matrix whose rows are no multiple of 32 inputs cannot be grouped and stays bfloat16.
    """
    packing = {}
    for name, shape in shapes.items():
        if stays_float(name, shape):
            packing[name] = Packing((32,), 0)
            continue
        fitting = largest_group(group, shape[1])
        packing[name] = Packing((width,), fitting) if fitting and width < 16 else Packing((16,), 0)
    return packing
