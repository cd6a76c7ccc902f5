"""A bundle's weights as the reference forward pass reads them: dequantised, one tensor or expert at a time."""

from dataclasses import dataclass

import numpy as np

from edge_moe import _core
from edge_moe.compressor.quantise import dequantise
from edge_moe.compressor.writer import Quantised
from edge_moe.runtime.bundle import TRUNK_FILE, Bundle


@dataclass(frozen=True, slots=True)
class BundleWeights:
    """trunk(name) and expert(layer, number among those kept), float32."""

    bundle: Bundle

    def trunk(self, name: str) -> np.ndarray:
        tensor = next(one for one in self.bundle.trunk if one.name == name)
        file, shape = self.bundle.path / TRUNK_FILE, (tensor.rows, tensor.cols)
        dtype = {32: np.float32, 16: np.uint16}.get(tensor.width, np.uint32)
        words = tensor.cols * tensor.width // 32 if tensor.width < 16 else tensor.cols
        packed = [np.fromfile(file, dtype, tensor.rows * words, offset=tensor.codes).reshape(tensor.rows, words)]
        if tensor.width < 16:
            groups = tensor.cols // tensor.group
            for offset in (tensor.scales, tensor.biases):
                packed.append(np.fromfile(file, np.uint16, tensor.rows * groups, offset=offset).reshape(-1, groups))
        values = dequantise(Quantised(*packed), tensor.width, tensor.cols).reshape(shape)
        return values[0] if name.endswith(("norm", "bias")) else values

    def expert(self, layer: int, number: int) -> tuple[np.ndarray, ...]:
        bundle, its = self.bundle, self.bundle.experts[layer, number]
        dim, hidden = bundle.config.dim, bundle.config.expert_hidden
        record = np.fromfile(bundle.files[its.file], np.uint8, its.nbytes, offset=its.offset)
        _, parts = _core.record_layout(dim, hidden, list(its.widths), its.group)
        matrices = []
        for (rows, cols), width, (codes, size, scales, scales_size, biases) in zip(
            ((hidden, dim), (hidden, dim), (dim, hidden)), its.widths, np.reshape(parts, (3, 5)).tolist(), strict=True
        ):
            dtype = np.uint16 if width == 16 else np.uint32
            packed = [record[codes : codes + size].view(dtype).reshape(rows, -1)]
            if width < 16:
                packed += [record[at : at + scales_size].view(np.uint16).reshape(rows, -1) for at in (scales, biases)]
            matrices.append(dequantise(Quantised(*packed), width, cols))
        return tuple(matrices)
