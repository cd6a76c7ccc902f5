"""The trunk in MLX's memory, as the reference forward pass reads it."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ... import _core
from ...devices.mlx.experts import PAGE_WORDS, Array
from ...devices.mlx.memory import allocate
from ..bundle import TRUNK_FILE, Bundle
from ..codecs import Encoding
from ..config import trunk_shapes

FLOATS = 1 << 22  # values of a matrix that is not quantised, made float32 at once


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix (rows, cols), or a vector, of the trunk."""

    encoding: Encoding
    shape: tuple[int, ...]
    codes: Array
    scales: Array | None = None  # float32 (rows, cols / group); of MXFP4 uint8
    biases: Array | None = None

    def __getitem__(self, rows) -> Array:
        """Some of the rows, float32 (..., cols)."""
        taken = (None if part is None else part[mx.array(rows)] for part in (self.codes, self.scales, self.biases))
        return floats(self.encoding, *taken)

    @property
    def values(self) -> Array:
        """All of it, float32."""
        return floats(self.encoding, self.codes, self.scales, self.biases).reshape(self.shape)

    def of_heads(self, heads: int, first: int, end: int | None) -> "Matrix":
        """Of a matrix whose rows are those of one head after another, each head's rows from `first` to `end`."""
        taken = (
            None if part is None else part.reshape(heads, -1, part.shape[-1])[:, first:end]
            for part in (self.codes, self.scales, self.biases)
        )
        return Matrix(self.encoding, self.shape, *taken)

    def times(self, x: Array) -> Array:
        """x (..., cols) times the transposed matrix."""
        if self.scales is None:
            return self._by_blocks(x)
        return self._quantised(x, True)

    def times_transposed(self, x: Array) -> Array:
        """x (..., rows) times the matrix."""
        return x @ self.codes.astype(mx.float32) if self.scales is None else self._quantised(x, False)

    def _quantised(self, x: Array, transpose: bool) -> Array:
        codec, width, group = self.encoding
        rest = {"group_size": group, "bits": width, "mode": "mxfp4" if codec == "mxfp4" else "affine"}
        return mx.quantized_matmul(x, self.codes, self.scales, self.biases, transpose=transpose, **rest)

    def _by_blocks(self, x: Array) -> Array:
        """times() of a matrix that is not quantised; some rows are float32 at a time."""
        *_, rows, cols = self.codes.shape
        step = max(1, FLOATS // cols)
        blocks = (self.codes[..., at : at + step, :].astype(mx.float32) for at in range(0, rows, step))
        found = [x @ block.swapaxes(-1, -2) for block in blocks]
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=-1)


def floats(encoding: Encoding, codes: Array, scales: Array | None, biases: Array | None) -> Array:
    """What a matrix's parts stand for, float32."""
    codec, width, group = encoding
    if scales is None:
        return codes.astype(mx.float32)
    if codec == "mxfp4":
        return mx.dequantize(codes, scales, group_size=group, bits=width, mode="mxfp4").astype(mx.float32)
    return mx.dequantize(codes, scales, biases, group, width)


class TrunkWeights:
    """A bundle's trunk and its tables of n-grams' embeddings.

    Scales and biases are float32 here, as MLX would make them of bfloat16 for each product with float32 inputs.

    Raises DamagedFile, an OSError, if the file does not match the bundle's table, and OSError if it cannot be read.
    """

    def __init__(self, bundle: Bundle):
        self._file_bytes = bundle.trunk_bytes
        arena, memory = allocate(_core.trunk_room(bundle.trunk_bytes))
        path = str(bundle.path / TRUNK_FILE)
        _core.read_trunk(path, bundle.trunk_bytes, bundle.trunk_checksum, bundle.trunk_table(), memory)

        def view(offset: int, nbytes: int, dtype, shape: tuple[int, ...]) -> Array:
            first = arena.base + offset // 4
            row, end = first // PAGE_WORDS, -(-(first + -(-nbytes // 4)) // PAGE_WORDS)
            words = arena.words[row:end].reshape(-1)[first - row * PAGE_WORDS :]
            return words[: -(-nbytes // 4)].view(dtype)[: nbytes // dtype.size].reshape(shape)

        shapes, self._matrices, self._tables = trunk_shapes(bundle.config), {}, {its.name: its for its in bundle.tables}
        for its in bundle.trunk:
            codec, width, group = its.encoding
            dtype = {"bfloat16": mx.bfloat16, "float32": mx.float32}.get(codec, mx.uint32)
            shape = shapes[its.name] if its.rows == 1 and dtype != mx.uint32 else (its.rows, its.cols)
            nbytes = its.rows * its.cols * width // 8
            parts = [view(its.offsets[0], nbytes, dtype, shape if dtype != mx.uint32 else (its.rows, -1))]
            for offset in its.offsets[1:]:
                of_scales = mx.uint8 if codec == "mxfp4" else mx.bfloat16
                scales = view(offset, its.rows * (its.cols // group) * of_scales.size, of_scales, (its.rows, -1))
                parts.append(scales if codec == "mxfp4" else scales.astype(mx.float32))
            mx.eval(parts)
            self._matrices[its.name] = Matrix(its.encoding, shapes[its.name], *parts)

    def trunk(self, name: str) -> Array | Matrix:
        """A tensor by canonical name, float32; of the embedding only rows that are asked for."""
        matrix = self._matrices[name]
        return matrix if name == "embedding" else matrix.values

    def rows_of(self, name: str, rows: np.ndarray) -> Array:
        """Rows of a tensor, float32 (len(rows), cols)."""
        return self._matrices[name][rows]

    def of_layer(self, layer: int) -> Callable[[str], Matrix]:
        """A function that returns a matrix of a layer, by its name there."""
        return lambda name: self._matrices[f"layers.{layer}.{name}"]

    def product(self, name: str, x: Array) -> Array:
        return self._matrices[name].times(x)

    def rows(self, name: str, rows: np.ndarray) -> Array:
        """Rows of a table, float32 (len(rows), cols). Raises ValueError for a damaged one."""
        table = self._tables[name]
        stored = np.concatenate([table.read(int(row), 1) for row in rows])
        _, places = _core.row_layout(table.encoding, table.cols)
        found = []
        for part in table.encoding.parts:
            offset, nbytes = places[part]
            raw = mx.array(np.ascontiguousarray(stored[:, offset : offset + nbytes]))
            of_codes = {"bfloat16": mx.bfloat16, "float32": mx.float32}.get(table.encoding.codec, mx.uint32)
            of_scales = mx.uint8 if table.encoding.codec == "mxfp4" else mx.bfloat16
            found.append(raw.view(of_codes if part == "codes" else of_scales))
        codes, scales, biases = (*found, None, None)[:3]
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return floats(table.encoding, codes, scales, biases)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, and of scales and biases beside its own."""
        parts = (part for its in self._matrices.values() for part in (its.scales, its.biases) if part is not None)
        return self._file_bytes + sum(part.nbytes for part in parts)
