"""bench/kernel_bandwidth.py: a row for every width, of every byte of its matrix."""

import numpy as np
import pytest

from edge_moe import _core
from edge_moe.bench.kernel_bandwidth import COLS, GROUP, kernel_bandwidth, make_noise, random_matrix, row_bytes


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_width_has_its_figures(threads):
    found = kernel_bandwidth(threads, (2, 3, 8), rounds=1, nbytes=1 << 16)
    assert [(its.width, its.threads) for its in found] == [(2, threads), (3, threads), (8, threads)]
    assert all(its.gbps > 0 and its.share > 0 for its in found)


@pytest.mark.parametrize("width", _core.WIDTHS[:-1])
def test_a_matrix_takes_the_bytes_that_are_counted(width):
    noise = make_noise(1 << 16)
    rows = len(noise) // row_bytes(width, GROUP)
    matrix = random_matrix(noise, rows, width, GROUP)
    assert sum(part.nbytes for part in matrix) == rows * row_bytes(width, GROUP) <= len(noise)
    x = np.ones((1, COLS), np.float32)
    assert np.isfinite(_core.matmul("scalar", *matrix, width, x)).all()
