"""Choosing the rows of calibration text on which an expert is measured and rounded."""

import numpy as np

LEAST_ROWS = 128  # minimum of tokens for an expert: those routed to it, then those that came closest to choosing it
FIT_BYTES = 64_000_000  # maximum of one expert's inputs for its second moments; more are sampled evenly


def with_nearest(routing, expert: int, rows: np.ndarray, routed: np.ndarray, most: int):
    """An expert's rows and routing weights, padded to LEAST_ROWS with those closest to choosing it among the first
    `most` rows."""
    if len(rows) >= LEAST_ROWS:
        return rows, routed
    others, share = routing.nearest_rows(expert, LEAST_ROWS - len(rows), most)
    return np.concatenate([rows, others]), np.concatenate([routed, share]).astype(np.float32)


def fitting_rows(rows: np.ndarray, routed: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """An expert's rows, sampled evenly if their inputs would exceed FIT_BYTES."""
    most = max(FIT_BYTES // (4 * dim), LEAST_ROWS)
    if len(rows) <= most:
        return rows, routed
    kept = np.linspace(0, len(rows) - 1, most).astype(np.int64)
    return rows[kept], routed[kept]
