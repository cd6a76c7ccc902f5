"""llama.cpp's quantisation types on the same experts and harness, with its own quantiser and an importance matrix.

Only the experts have the type; the trunk is rounded to nearest, as in every row without calibration. The weights are
read back by gguf, which is independent of the quantiser, and scored as bfloat16. If a row is not a multiple of a
block's 256 weights, llama.cpp takes a wider type; here blocks continue in the next row instead. The importance is the
mean square of an expert's inputs over the calibration tokens that chose it, as in llama-imatrix.
"""

import ctypes
import importlib.util
import math
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np

from edge_moe.compressor.passes import forward
from edge_moe.compressor.passes.streams import Stream
from edge_moe.compressor.rounding.quantise import to_bfloat16
from edge_moe.compressor.source.checkpoint import Checkpoint
from edge_moe.compressor.writing.writer import Packing, Quantised
from edge_moe.runtime import reference
from edge_moe.runtime.config import ModelConfig

from .forms import Form
from .peers import calibration_ids, write_bundle
from .study import Study

TYPES = {  # true bits a weight
    "IQ1_S": 1.5625,
    "IQ1_M": 1.75,
    "IQ2_XXS": 2.0625,
    "IQ2_XS": 2.3125,
    "IQ2_S": 2.5625,
    "Q2_K": 2.625,
    "IQ3_XXS": 3.0625,
    "IQ3_S": 3.4375,
    "Q3_K": 3.4375,
    "IQ4_XS": 4.25,
    "Q4_K": 4.5,
    "Q4_0": 4.5,
}
NEAR = 0.15  # maximum difference in bits between a type and the size at which it is shown
BLOCK = 256  # weights of a block, or a multiple of them

Importance = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]  # by layer and expert: for gate and up, and for down


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def forms(bits: float) -> list[Form]:
    """The forms of types with about `bits` true bits."""
    return [
        Form(f"llama.cpp {name}", bits, {}, make=partial(make, name=name), true_bits=its)
        for name, its in TYPES.items()
        if abs(its - bits) < NEAR
    ]


def make(study: Study, form: Form, out: Path, name: str) -> None:
    """Write a bundle with the experts' weights rounded to a type, and with the checkpoint's trunk."""
    how, importance = Quantiser(name), importance_of(study)

    def record_of(checkpoint: Checkpoint, key: tuple[int, int]) -> list[Quantised]:
        of_input, of_inner = importance[key]
        matrices = zip(checkpoint.expert(*key), (of_input, of_input, of_inner), strict=True)
        return [Quantised(to_bfloat16(how(*its))) for its in matrices]

    write_bundle(study, out, "llama.cpp", dict.fromkeys(importance, Packing((16,) * 3, 0)), record_of)


class Quantiser:
    """Quantises with ggml_quantize_chunk() of one type, and reads the result back with gguf."""

    def __init__(self, name: str):
        from gguf import GGMLQuantizationType

        package = Path(importlib.util.find_spec("llama_cpp").origin).parent
        directory = Path(os.environ.get("LLAMA_CPP_LIB_PATH", package / "lib"))
        self.type, self.library = GGMLQuantizationType[name], ctypes.CDLL(str(directory / "libggml-base.so"))
        self.library.ggml_quantize_init(ctypes.c_int(self.type))
        floats = ctypes.POINTER(ctypes.c_float)
        self.library.ggml_quantize_chunk.argtypes = [
            *(ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, floats)
        ]
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def __call__(self, weights: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """Round float32 weights (rows, cols) to the type. importance: (cols,)."""
        from gguf import quant_shape_to_byte_shape
        from gguf.quants import dequantize

        rows_a_line = math.lcm(weights.shape[1], BLOCK) // weights.shape[1]
        lines = np.ascontiguousarray(weights, np.float32).reshape(-1, rows_a_line * weights.shape[1])
        counts = np.ascontiguousarray(np.tile(importance, rows_a_line), np.float32)
        packed = np.empty(quant_shape_to_byte_shape(lines.shape, self.type), np.uint8)
        pointer = ctypes.POINTER(ctypes.c_float)
        written = self.library.ggml_quantize_chunk(
            *(self.type, lines.ctypes.data_as(pointer), packed.ctypes.data, 0, *lines.shape),
            counts.ctypes.data_as(pointer),
        )
        if written != packed.nbytes:
            raise AssertionError(f"{self.type.name}: {written} bytes were written, expected {packed.nbytes}")
        return dequantize(packed, self.type).reshape(weights.shape)


def importance_of(study: Study) -> Importance:
    """The importance of every expert of the model, cached in the work directory."""
    kept = study.work / "importance.pickle"
    if not kept.exists():
        partial_file = kept.with_suffix(f".{os.getpid()}")
        with Checkpoint(study.model) as checkpoint:
            ids = calibration_ids(study, study.calibration_tokens)
            partial_file.write_bytes(pickle.dumps(mean_squares(checkpoint.config, checkpoint, ids)))
        os.replace(partial_file, kept)
    return pickle.loads(kept.read_bytes())


def mean_squares(config: ModelConfig, weights, ids: np.ndarray) -> Importance:
    """Mean squares of the inputs of each expert's matrices over the tokens that chose it; 1 if there are none.

    ids: (sequences, tokens)."""
    found, x = {}, Stream(ids.size, config.width)
    forward.embed(config, weights, ids, x)
    for layer in range(config.layer_count):
        a, y = Stream(ids.size, config.width), Stream(ids.size, forward.sums_dim(config, layer))
        norms = forward.Held(weights)
        forward.add_ngrams(config, weights, layer, x, ids)
        forward.attention(config, weights, layer, x, ids.shape[1], a)
        forward.common_mlp(config, weights, layer, a, y)
        if layer in config.moe_layers:
            routing = forward.route(config, weights, layer, a, ids)
            for expert in range(config.experts):
                (rows, weight), matrices = routing.rows_of(expert), weights.expert(layer, expert)
                h = forward.expert_input(config, norms, layer, a, rows)
                bias = reference.expert_bias(config, weights, layer, expert)
                inner = reference.expert_inner(config, h, *matrices[:2], bias=bias)
                y.add(rows, reference.plus(inner @ matrices[2].T, bias[2]) * weight[:, None])
                found[layer, expert] = tuple(
                    np.square(its).mean(axis=0) if len(rows) else np.ones(its.shape[1], np.float32)
                    for its in (h, inner)
                )
        x = forward.finish_mlp(config, weights, layer, a, y, lambda _, rows: Stream(rows, config.width))
    return found
