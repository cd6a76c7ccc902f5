"""Which rows of calibration text an expert is measured and rounded on."""

import numpy as np

LEAST_ROWS = 128  # tokens an expert is given: its own, then those whose router score came closest to choosing it
FIT_BYTES = 64_000_000  # of one expert's inputs that its second moments are taken over; more are sampled evenly


def with_nearest(routing, expert: int, rows: np.ndarray, routed: np.ndarray, most: int):
    """Rows of an expert and their routing weights, filled up to LEAST_ROWS with those that came closest to it."""
    if len(rows) >= LEAST_ROWS:
        return rows, routed
    others, share = routing.nearest_rows(expert, LEAST_ROWS - len(rows), most)
    return np.concatenate([rows, others]), np.concatenate([routed, share]).astype(np.float32)


def fitting_rows(rows: np.ndarray, routed: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """At most as many of an expert's rows as FIT_BYTES hold, sampled evenly."""
    most = max(FIT_BYTES // (4 * dim), LEAST_ROWS)
    if len(rows) <= most:
        return rows, routed
    kept = np.linspace(0, len(rows) - 1, most).astype(np.int64)
    return rows[kept], routed[kept]
