"""A bundle's weights as the reference forward pass reads them: dequantised, one tensor or expert at a time."""

from dataclasses import dataclass

import numpy as np

from ... import _core
from ...runtime.bundle import TRUNK_FILE, Bundle
from ...runtime.codecs import PROJECTIONS, Encoding, trunk_parts
from ...runtime.config import ModelConfig, trunk_shapes
from ...runtime.tensorfile import bytes_of
from ..writing.writer import Quantised
from .quantise import dequantise


@dataclass(frozen=True, slots=True)
class BundleWeights:
    """trunk(name), expert(layer, number among those kept) and expert_bias() of the same, float32."""

    bundle: Bundle

    @property
    def config(self) -> ModelConfig:
        return self.bundle.config

    def trunk(self, name: str) -> np.ndarray:
        tensor = next(one for one in self.bundle.trunk if one.name == name)
        parts = []
        for (_, _, dtype, shape), at in zip(
            trunk_parts(name, (tensor.rows, tensor.cols), tensor.encoding), tensor.offsets, strict=True
        ):
            data = np.fromfile(self.bundle.path / TRUNK_FILE, np.uint8, bytes_of(dtype, shape), offset=at)
            parts.append(data.reshape(tensor.rows, -1))
        values = unpacked(parts, tensor.encoding, tensor.cols)
        return values[0] if len(trunk_shapes(self.config)[name]) == 1 else values

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of a table, float32 (len(rows), cols)."""
        table = next(one for one in self.bundle.tables if one.name == name)
        stored = np.concatenate([table.read(int(row), 1) for row in rows])
        _, places = _core.row_layout(table.encoding, table.cols)
        parts = [
            np.ascontiguousarray(stored[:, at : at + size]) for at, size in (places[p] for p in table.encoding.parts)
        ]
        return unpacked(parts, table.encoding, table.cols)

    def expert(self, layer: int, number: int) -> tuple[np.ndarray, ...]:
        encodings = self.bundle.experts[layer, number].encodings
        matrices = zip(self.parts(layer, number), encodings, self.config.expert_shapes, strict=True)
        return tuple(
            unpacked(parts, encoding, cols) if rows else np.zeros((0, cols), np.float32)
            for parts, encoding, (rows, cols) in matrices
        )

    def expert_bias(self, layer: int, number: int) -> tuple[np.ndarray, ...]:
        """What is added to the products of gate, up and down, (rows,) each, of a model that has it."""
        parts = self._record(layer, number)
        return tuple(parts[f"{projection}.output_bias"].view(np.float32) for projection in PROJECTIONS)

    def parts(self, layer: int, number: int) -> list[list[np.ndarray]]:
        """gate, up and down as they lie in the file: the parts of the codec of each, (rows, bytes) each; of a gate that
        is not there, none."""
        found = self._record(layer, number)
        encodings = self.bundle.experts[layer, number].encodings
        return [
            [found[f"{projection}.{part}"].reshape(rows, -1) for part in encoding.parts] if rows else []
            for projection, (rows, _), encoding in zip(PROJECTIONS, self.config.expert_shapes, encodings, strict=True)
        ]

    def _record(self, layer: int, number: int) -> dict[str, np.ndarray]:
        """The bytes of a record's parts, by name."""
        its = self.bundle.experts[layer, number]
        record = np.fromfile(self.bundle.files[its.file], np.uint8, its.nbytes, offset=its.offset)
        parts = self.bundle.layouts[its.layout].parts
        return {name: record[at : at + nbytes] for name, (at, nbytes) in parts.items()}


def unpacked(parts: list[np.ndarray], encoding: Encoding, cols: int) -> np.ndarray:
    """float32 (rows, cols) of the parts of a matrix's codec as bytes, (rows, bytes) each."""
    codes, *others = parts
    if not encoding.grouped:
        codes = codes.view({"bfloat16": np.uint16, "float32": np.float32}[encoding.codec])
    if encoding.codec == "affine":
        others = [part.view(np.uint16) for part in others]
    return dequantise(Quantised(codes, *others), encoding.width, cols)
