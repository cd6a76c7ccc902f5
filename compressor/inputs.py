"""What a matrix is multiplied by on calibration text, as rounding takes it in: second moments, and steps to a target.

A step towards a target is fitted to tokens, and what it promises on these it need not keep on others: with few tokens
for many inputs, or where a few tokens miss their target by a thousand times as much as the others, it is mostly noise.
So each half of the tokens is asked what it wants, and the other half what that is worth, row by row of the matrix. On
the reference model (8,192 tokens, KLD on 5,100 of five other texts): no step 0.0531, whole steps 0.0436, confirmed ones
0.0451 at 2 bits; 0.0096, 0.0096 and 0.0088 at 3 bits.
"""

import numpy as np

from edge_moe.compressor.gptq import Curvature, damping_for


def curvature_of(x: np.ndarray, token_weights: np.ndarray, order_group: int = 0) -> Curvature:
    """The damped second moment of the inputs x (rows, cols), rows weighted by token_weights (rows,)."""
    return Curvature.of(_moment(x, _normalised(token_weights)), damping_for(*x.shape), order_group)


class Inputs:
    """Inputs x (rows, cols), rows weighted by token_weights (rows,): their curvature, and the steps they ask for."""

    def __init__(self, x: np.ndarray, token_weights: np.ndarray, order_group: int = 0):
        self.x, self.token_weights = x, _normalised(token_weights)
        self._moments = [_moment(x[half], self.token_weights[half]) for half in (_EVEN, _ODD)]
        self.curvature = Curvature.of(sum(self._moments), damping_for(*x.shape), order_group)
        self._of_halves = None

    def step(self, missing: np.ndarray) -> np.ndarray:
        """The change (matrix rows, cols) that brings a matrix closest to a target, as far as it is confirmed.

        missing: (rows, matrix rows), the target less what the matrix gives. Least squares, drawn to no change by the
        damping; then each row is scaled by the share, 0 to 1, that lowers the error of the tokens that it was not
        fitted to the most.
        """
        asked = [
            (missing[half] * self.token_weights[half, None]).T @ self.x[half] for half in (_EVEN, _ODD)
        ]  # (matrix rows, cols): mean of missing x^T, each half's part
        gain, curve = np.zeros((2, len(asked[0])), np.float32)
        for fitted, its in enumerate(self._curvatures()):
            other = 1 - fitted
            step = its.solve(asked[fitted])
            gain += (step * asked[other]).sum(axis=1)
            curve += ((step @ self._moments[other]) * step).sum(axis=1)
        share = np.clip(gain / np.maximum(curve, 1e-30), 0, 1)
        return self.curvature.solve(sum(asked)) * share[:, None]

    def _curvatures(self) -> list[Curvature]:
        if self._of_halves is None:
            rows, cols = self.x.shape
            self._of_halves = [Curvature.of(moment, damping_for(rows // 2, cols)) for moment in self._moments]
        return self._of_halves


_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)


def _normalised(token_weights: np.ndarray) -> np.ndarray:
    return token_weights / max(float(token_weights.sum()), 1e-30)


def _moment(x: np.ndarray, token_weights: np.ndarray) -> np.ndarray:
    return (x * token_weights[:, None]).T @ x
