"""A bundle's weights as the reference forward pass reads them: dequantised, one tensor or expert at a time."""

from dataclasses import dataclass

import numpy as np

from ... import _core
from ...runtime.bundle import TRUNK_FILE, Bundle
from ...runtime.config import ModelConfig
from ..writing.writer import Quantised
from .quantise import dequantise


@dataclass(frozen=True, slots=True)
class BundleWeights:
    """trunk(name) and expert(layer, number among those kept), float32."""

    bundle: Bundle

    @property
    def config(self) -> ModelConfig:
        return self.bundle.config

    def trunk(self, name: str) -> np.ndarray:
        tensor = next(one for one in self.bundle.trunk if one.name == name)
        file, shape = self.bundle.path / TRUNK_FILE, (tensor.rows, tensor.cols)
        if tensor.width == 32:
            values = np.fromfile(file, np.float32, tensor.rows * tensor.cols, offset=tensor.codes).reshape(shape)
        else:
            groups = tensor.cols // tensor.group if tensor.width < 16 else 0
            sizes = (tensor.cols * tensor.width // 8, 2 * groups, 2 * groups)  # bytes of a row
            offsets = (tensor.codes, tensor.scales, tensor.biases)
            parts = [
                np.fromfile(file, np.uint8, tensor.rows * size, offset=at).reshape(tensor.rows, size)
                for at, size in zip(offsets, sizes, strict=True)
                if size
            ]
            values = unpacked(parts, tensor.width, tensor.cols)
        return values[0] if name.endswith(("norm", "bias")) else values

    def expert(self, layer: int, number: int) -> tuple[np.ndarray, ...]:
        dim, hidden = self.config.dim, self.config.expert_hidden
        widths = self.bundle.experts[layer, number].widths
        matrices = zip(self.parts(layer, number), widths, (dim, dim, hidden), strict=True)
        return tuple(unpacked(parts, width, cols) for parts, width, cols in matrices)

    def parts(self, layer: int, number: int) -> list[list[np.ndarray]]:
        """gate, up and down as they lie in the file: codes, scales, biases (none at width 16), (rows, bytes) each."""
        its, dim, hidden = self.bundle.experts[layer, number], self.config.dim, self.config.expert_hidden
        record = np.fromfile(self.bundle.files[its.file], np.uint8, its.nbytes, offset=its.offset)
        _, layout = _core.record_layout(dim, hidden, list(its.widths), its.group)
        matrices = []
        for rows, width, (codes, size, scales, scales_size, biases) in zip(
            (hidden, hidden, dim), its.widths, np.reshape(layout, (3, 5)).tolist(), strict=True
        ):
            ends = ((codes, size), (scales, scales_size), (biases, scales_size))
            matrices.append([record[at : at + n].reshape(rows, -1) for at, n in ends[: 1 if width == 16 else 3]])
        return matrices


def unpacked(parts: list[np.ndarray], width: int, cols: int) -> np.ndarray:
    """float32 (rows, cols) of codes, scales and biases as bytes, (rows, bytes) each; at width 16 codes alone."""
    if width == 16:
        return dequantise(Quantised(parts[0].view(np.uint16)), width, cols)
    return dequantise(Quantised(parts[0], *(part.view(np.uint16) for part in parts[1:])), width, cols)
