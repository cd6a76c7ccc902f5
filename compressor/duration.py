"""How long compressing will take on this machine: a piece of one expert is rounded, and the rest is arithmetic.

Rounding a matrix (rows, cols) takes rows x (a x cols + b x cols^2), factoring a second moment cols^3. Both are timed on
pieces that take a second or two at the most, and scaled up; products of matrices, which carry text through the layers,
go by the machine's speed at them.
"""

import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from ..runtime.config import ModelConfig, stays_float, trunk_shapes, without_layer
from ..runtime.layers.compressed import CompressedAttention
from .choosing import trunk
from .choosing.sensitivity import sampled_sequences
from .memory import Memory
from .passes.calibrate import Calibration
from .passes.expert_rows import FIT_BYTES
from .rounding.gptq import SWEEPS, Curvature, gptq
from .rounding.round_trunk import FITTED_ROWS
from .writing.writer import table_packing

PIECE_ROWS, PIECE_COLS = 256, 1024  # of a matrix that is timed, at the most
PRODUCT = 512  # rows and columns of the product that is timed
WIDTH = 3  # of the codes; others take as long within a tenth
GROUP = 32  # that fits every matrix
FORMS = 2  # of the model that are rounded: the bundle, and one width to compare with


def estimate_seconds(compression, calibration: Calibration | None, memory: Memory) -> float:
    """Seconds that a run of compression.Compression will take, within a factor of about two.

    calibration: shapes of the text, None for a run without any. Takes a few seconds itself.
    """
    import scipy.linalg  # noqa: F401 (limits hold for the libraries that are loaded)

    workers, threads = memory.workers(compression.threads)
    with threadpool_limits(threads):  # as the run has it; more would wait for each other, and spin
        return _estimate(compression, calibration, workers)


def _estimate(compression, calibration: Calibration | None, workers: int) -> float:
    o, config, checkpoint = compression.o, compression.config, compression.checkpoint
    layer = config.moe_layers[0]
    matrices = [matrix for matrix in checkpoint.expert(layer, 0) if len(matrix)]
    reading = _seconds(lambda: checkpoint.expert(layer, 0)) * config.expert_count + _table_seconds(compression)
    if calibration is None or config.dim % GROUP or config.expert_hidden % GROUP:
        packing = sum(_plain_seconds(compression, matrix) for matrix in matrices) * config.expert_count
        return reading + packing
    per_flop = _product_seconds() / (2 * PRODUCT**3)

    def rounding(sweeps: int) -> float:
        """Of one expert's matrices."""
        return sum(_matrix_seconds(matrix, sweeps) for matrix in matrices)

    moments = sum(_moment_seconds(cols) for cols in (config.dim, config.expert_hidden))
    rows, tokens = calibration.ids.size, calibration.ids.shape[1]
    its_rows = min(rows * config.top_k / config.experts, FIT_BYTES / (4 * config.dim))
    fitting = its_rows * per_flop * 2 * (config.dim**2 + config.expert_hidden**2 + 3 * config.expert_weights)
    forms = FORMS if o.certificate else 1
    experts = forms * (moments + rounding(SWEEPS) + fitting)
    choices = len(compression.measured_choices())
    if choices:
        experts += moments + fitting + choices * (rounding(0) + its_rows * per_flop * 3 * config.expert_weights)

    active = config.expert_weights * config.top_k * len(config.moe_layers)
    shapes = trunk_shapes(config).items()
    common = sum(int(np.prod(shape)) for name, shape in shapes if name not in ("embedding", "head"))
    sample = sampled_sequences(config, *calibration.ids.shape) * tokens
    kinds = len(trunk.kinds(config)) if o.chooses_trunk else 0
    passes = (rows + sample * (len(config.moe_layers) / 2 + kinds)) if choices else 0
    passes += (rows + calibration.held_out.size * o.certificate) * (1 + 2 * forms)
    fitted = forms * _trunk_seconds(config, rounding(SWEEPS) / config.expert_weights, per_flop)
    beside = (experts * config.expert_count + 2 * per_flop * (active + common) * passes) / workers
    return beside + fitted + reading


def _trunk_seconds(config: ModelConfig, per_weight: float, per_flop: float) -> float:
    """Of rounding the trunk once, but for the embedding."""
    seconds, widths = 0.0, []
    inputs = {stage[0]: 1 for its in config.attentions for stage in its.stages()} | {"head": 1}
    for part in ("gate" if config.gated else "up", "down"):
        inputs |= {f"shared.{part}": 1, f"dense.{part}": 1}
    inputs |= {its.grouped: its.groups for its in config.attentions if isinstance(its, CompressedAttention)}
    for name, shape in trunk_shapes(config).items():
        if name != "embedding" and not stays_float(name, shape):
            seconds += per_weight * int(np.prod(shape))
            widths += [shape[1]] * inputs.get(without_layer(name), 0)
    moment = {cols: _moment_seconds(cols) for cols in set(widths)}
    return seconds + sum(3 * moment[cols] + per_flop * 4 * FITTED_ROWS * cols**2 for cols in widths)


def _plain_seconds(compression, matrix: np.ndarray) -> float:
    """Of packing one matrix without any text, as the run will."""
    from .rounding.quantise import quantise

    o = compression.o
    if o.method == "keep":
        return 0.0
    width = 16 if o.bits == 16 else o.width or WIDTH
    piece = np.ascontiguousarray(matrix[:PIECE_ROWS])
    took = _seconds(lambda: quantise(piece, width, GROUP, search=o.method != "rtn", threads=compression.threads))
    return took * len(matrix) / len(piece)


def _table_seconds(compression) -> float:
    """Of reading and packing the tables of n-gram embeddings."""
    from .rounding.quantise import quantise

    seconds, checkpoint = 0.0, compression.checkpoint
    for name, (rows, cols) in compression.config.tables.items():
        packing, some = table_packing(compression.trunk["embedding"], cols), min(rows, 8 * PIECE_ROWS)

        def pack(name=name, packing=packing, some=some) -> None:
            values = checkpoint.table_part(name, 0, some)
            quantise(values, packing.widths[0], packing.group, search=False, threads=compression.threads)

        seconds += _seconds(pack) * rows / some
    return seconds


def _matrix_seconds(matrix: np.ndarray, sweeps: int) -> float:
    """Of GPTQ on one matrix, from pieces of it with two numbers of columns."""
    rows, cols = matrix.shape
    large = min(cols, PIECE_COLS) // GROUP * GROUP
    sizes = [large] if large == cols else [large // 2 // GROUP * GROUP, large]
    piece_rows, took = min(rows, PIECE_ROWS), []
    for size in sizes:
        curvature = Curvature.of(np.eye(size, dtype=np.float32))
        piece = np.ascontiguousarray(matrix[:piece_rows, :size])
        took.append(_seconds(lambda piece=piece, its=curvature: gptq(piece, its, WIDTH, GROUP, sweeps=sweeps)))
    if len(sizes) == 1:
        return took[0] * rows / piece_rows
    fitted = np.linalg.solve([[size, size**2] for size in sizes], took)
    linear, square = np.maximum(fitted, 0)
    return max(linear * cols + square * cols**2, took[-1] * cols / large) * rows / piece_rows


def _moment_seconds(cols: int) -> float:
    """Of factoring a second moment."""
    size = min(cols, PIECE_COLS)
    return _seconds(lambda: Curvature.of(np.eye(size, dtype=np.float32))) * (cols / size) ** 3


def _product_seconds() -> float:
    square = np.ones((PRODUCT, PRODUCT), np.float32)
    return _seconds(lambda: square @ square)


def _seconds(work: Callable) -> float:
    """The shorter of two runs: the first of a library's function finds nothing in any cache."""
    took = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
        if took[0] > 1:
            break
    return min(took)
