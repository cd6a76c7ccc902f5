"""SparseMixer's router (arXiv 2409.12136) at inference: experts are chosen one by one, each with its own softmax.

Each expert is the one with the largest logit of those not chosen yet. Its weight is a softmax over those whose logit is
below the largest by at most `threshold` times the maximum of |logit| and the largest logit.
"""

import numpy as np


def choose(logits: np.ndarray, top_k: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each row, (rows, top_k), by descending weight, and the softmax of each, (rows, top_k, experts).

    logits: (rows, experts). An expert's weight is its own entry in its softmax; ties go to the one chosen first.
    """
    left = np.array(logits)
    chosen = np.empty((len(left), top_k), np.int64)
    p = np.zeros((len(left), top_k, left.shape[1]), left.dtype)
    for k in range(top_k):
        chosen[:, k] = left.argmax(axis=-1)
        top = left.max(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0, if all are zeros, is not above the threshold
            far = (top - logits) / np.maximum(np.abs(logits), top) > np.float32(threshold)
        e = np.exp(np.where(far, -np.inf, left) - top)
        p[:, k] = e / e.sum(axis=-1, keepdims=True)
        np.put_along_axis(left, chosen[:, k : k + 1], -np.inf, axis=-1)
    order = np.argsort(-weights_of(chosen, p), axis=-1, kind="stable")
    return np.take_along_axis(chosen, order, axis=-1), np.take_along_axis(p, order[..., None], axis=1)


def weights_of(chosen: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The weights of the experts that choose() returned, (rows, top_k)."""
    return np.take_along_axis(p, chosen[..., None], axis=-1)[..., 0]


def backward(chosen: np.ndarray, p: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The gradient with respect to the logits, (..., rows, experts), for g (..., rows, top_k), that of the weights.

    The set of logits within the threshold is treated as constant.
    """
    g = g * weights_of(chosen, p)
    back = -np.einsum("...rk,rke->...re", g, p)
    rows = np.arange(len(chosen))
    for k in range(chosen.shape[1]):  # a row's experts differ, so no index repeats
        back[..., rows, chosen[:, k]] += g[..., k]
    return back
