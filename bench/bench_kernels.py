"""Benchmarks of one thread multiplying by a packed matrix: decode (one token, from memory) and prefill (32 tokens).

A matrix for decode is larger than any cache, so its figure is bytes a second from memory; prefill is compute-bound, so
its matrix may be in the cache. Both include rounding the tokens to int8. Rows of the results are compared bit for bit
with those of the scalar kernels.
"""

import numpy as np
import pytest

from edge_moe import _core
from edge_moe.bench.kernel_bandwidth import NOISE_BYTES, make_noise, random_matrix, row_bytes

KERNELS = _core.kernel_names()[0]  # the fastest on this machine
FORMATS = [*((width, 64) for width in _core.WIDTHS if width < 16), (2, 128)]
NAMES = [f"{width} bits, group {group}" for width, group in FORMATS]
every_format = pytest.mark.parametrize("width, group", FORMATS, ids=NAMES)
PREFILL_WEIGHTS = 1 << 24
COLS = 4096
CHECKED_ROWS = 16


@pytest.fixture(scope="module")
def noise(small) -> np.ndarray:
    """Random bytes for the largest matrix."""
    return make_noise(1 << 20 if small else NOISE_BYTES)


@pytest.mark.benchmark(group="matmul, 1 token, from memory")
@every_format
def test_decode(benchmark, noise, width, group):
    _multiply(benchmark, noise, len(noise) // row_bytes(width, group, COLS), 1, width, group)


@pytest.mark.benchmark(group="matmul, 32 tokens")
@every_format
def test_prefill(benchmark, noise, small, width, group):
    _multiply(benchmark, noise, 64 if small else PREFILL_WEIGHTS // COLS, 32, width, group)


def _multiply(benchmark, noise: np.ndarray, rows: int, tokens: int, width: int, group: int) -> None:
    """Time x (tokens, COLS) times a matrix (rows, COLS)."""
    codes, scales, biases = random_matrix(noise, rows, width, group, COLS)
    x = np.random.default_rng(tokens).standard_normal((tokens, COLS), np.float32)

    y = benchmark(_core.matmul, KERNELS, codes, scales, biases, width, x)

    some = np.linspace(0, rows - 1, CHECKED_ROWS).astype(int)
    want = _core.matmul("scalar", codes[some], scales[some], biases[some], width, x)
    assert np.array_equal(y[:, some], want)
    nbytes = codes.nbytes + scales.nbytes + biases.nbytes
    benchmark.extra_info |= {"kernels": KERNELS, "threads": 1, "tokens": tokens, "bytes": nbytes}
    if benchmark.stats:  # None when timing is disabled
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"gbps": nbytes / seconds / 1e9, "gmacs": rows * COLS * tokens / seconds / 1e9}
