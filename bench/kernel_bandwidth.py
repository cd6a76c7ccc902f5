"""Measuring the share of memory bandwidth that the kernels reach: one token times a matrix larger than caches.

The bandwidth is that of NumPy's maximum over the same bytes, with the same threads, in the same round.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .. import _core

NOISE_BYTES = 1 << 29  # codes, scales and biases; larger than caches, which have up to 0.3 GB
COLS = 2048
GROUP = 64
ROUNDS = 9


@dataclass
class KernelBandwidth:
    width: int
    threads: int
    gbps: float  # of codes, scales and biases, median of the rounds
    share: float  # of the bandwidth of reading alone in the same round, median
    best_gbps: float  # of the best round, least disturbed by other programs


def kernel_bandwidth(
    threads: int, widths: tuple[int, ...], rounds: int = ROUNDS, nbytes: int = NOISE_BYTES
) -> list[KernelBandwidth]:
    """Measure this machine's fastest kernels at each width, with rows of its own for each thread."""
    noise, kernels = make_noise(nbytes), _core.kernel_names()[0]
    x = np.random.default_rng(0).standard_normal((1, COLS), np.float32)
    matrices = {width: random_matrix(noise, nbytes // row_bytes(width, GROUP), width, GROUP) for width in widths}
    words = np.array_split(noise.view(np.uint64), threads)
    gbps, shares = {width: [] for width in widths}, {width: [] for width in widths}

    with ThreadPoolExecutor(threads) as pool:

        def timed(function, parts, size: int) -> float:
            began = time.perf_counter()
            list(pool.map(function, parts))
            return size / (time.perf_counter() - began) / 1e9

        for round in range(rounds + 1):
            read = timed(np.max, words, nbytes)
            for width, matrix in matrices.items():
                rows = len(matrix[0])
                edges = [rows * i // threads for i in range(threads + 1)]

                def product(i: int, matrix=matrix, width=width, edges=edges) -> None:
                    _core.matmul(kernels, *matrix, width, x, row_begin=edges[i], row_end=edges[i + 1])

                found = timed(product, range(threads), sum(part.nbytes for part in matrix))
                if round:  # the first round faults the pages in
                    gbps[width].append(found)
                    shares[width].append(found / read)
    return [
        KernelBandwidth(
            width, threads, statistics.median(gbps[width]), statistics.median(shares[width]), max(gbps[width])
        )
        for width in widths
    ]


def row_bytes(width: int, group: int, cols: int = COLS) -> int:
    return cols * width // 8 + 4 * cols // group


def make_noise(nbytes: int) -> np.ndarray:
    """Random bytes (nbytes,), to be used as codes of any matrix."""
    return np.random.default_rng(0).integers(0, 2**64, nbytes // 8, np.uint64).view(np.uint8)


def random_matrix(noise: np.ndarray, rows: int, width: int, group: int, cols: int = COLS) -> tuple[np.ndarray, ...]:
    """Codes (rows, cols*width/8) from the noise, and scales and biases (rows, cols/group) as bits of bfloat16."""
    random = np.random.default_rng(width)
    codes = noise[: rows * cols * width // 8].reshape(rows, -1)
    return codes, *(_bfloat16(random, (rows, cols // group)) for _ in range(2))


def _bfloat16(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Random signs and mantissas around 1/64, as bits."""
    bits = random.integers(0, 2**16, shape, np.uint16)
    return (bits & 0x807F) | np.uint16(121 << 7)
