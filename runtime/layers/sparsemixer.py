"""SparseMixer's router (arXiv 2409.12136) as inference has it: experts one by one, each with a softmax of its own.

An expert is the one of the largest logit that is left. Its weight is a softmax over those that are left and near: whose
logit is below the largest by no more than `threshold` times the larger of its own size and the largest logit.
"""

import numpy as np


def choose(logits: np.ndarray, top_k: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each row, (rows, top_k), heaviest first, and the softmax of each, (rows, top_k, experts).

    logits: (rows, experts). An expert's weight is its own entry in its softmax; of equals the one taken first is first.
    """
    left = np.array(logits)
    chosen = np.empty((len(left), top_k), np.int64)
    p = np.zeros((len(left), top_k, left.shape[1]), left.dtype)
    for k in range(top_k):
        chosen[:, k] = left.argmax(axis=-1)
        top = left.max(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):  # zeros alone are near each other: 0 / 0 is not above
            far = (top - logits) / np.maximum(np.abs(logits), top) > np.float32(threshold)
        e = np.exp(np.where(far, -np.inf, left) - top)
        p[:, k] = e / e.sum(axis=-1, keepdims=True)
        np.put_along_axis(left, chosen[:, k : k + 1], -np.inf, axis=-1)
    order = np.argsort(-weights_of(chosen, p), axis=-1, kind="stable")
    return np.take_along_axis(chosen, order, axis=-1), np.take_along_axis(p, order[..., None], axis=1)


def weights_of(chosen: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The weights of the experts that choose() gave, (rows, top_k)."""
    return np.take_along_axis(p, chosen[..., None], axis=-1)[..., 0]


def backward(chosen: np.ndarray, p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The gradient at the logits, (..., rows, experts), of g (..., rows, top_k) at the weights.

    Which logits are near is taken to stay as it is.
    """
    g = g * weights_of(chosen, p)
    back = -np.einsum("...rk,rke->...re", g, p)
    rows = np.arange(len(chosen))
    for k in range(chosen.shape[1]):  # the experts of a row differ
        back[..., rows, chosen[:, k]] += g[..., k]
    return back
