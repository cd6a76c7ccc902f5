"""The rules by which a token keeps fewer experts, computed where its routing weights are; see reference.py."""

import math

import mlx.core as mx
import numpy as np

from ...devices.mlx.experts import Array

LEAST_SHARE, MOST_LOG_LOSS = 1e-6, 80.0


def kept_by_ratio(weights: Array, threshold: float) -> Array:
    """How many of the weights (tokens, top_k) are at least `threshold` times the largest, (tokens, 1)."""
    return (weights >= threshold * weights[:, :1]).sum(-1, keepdims=True)


def kept_by_share(weights: Array, threshold: float) -> Array:
    """The minimum number of weights that reach `threshold` times the sum of all, (tokens, 1)."""
    before = mx.cumsum(weights, axis=-1) - weights
    return mx.maximum((before < threshold * weights.sum(-1, keepdims=True)).sum(-1, keepdims=True), 1)


def kept_by_router(router: Array, h: Array, weights: Array, price: float, losses: bool) -> Array:
    """The number of experts that a mask router (top_k, dim + 2 top_k + 1) keeps, (tokens, 1)."""
    top_k, every = weights.shape[1], weights.sum(-1, keepdims=True)
    share = mx.maximum(weights / mx.where(every > 0, every, 1), LEAST_SHARE)  # a table may name no expert
    values = mx.concatenate([h, mx.log(share), share, mx.ones((len(h), 1))], axis=-1) @ router.T
    if losses:
        values = -mx.exp(mx.minimum(values, MOST_LOG_LOSS))
        values = mx.concatenate([values[:, :-1], mx.zeros((len(h), 1))], axis=-1)  # keeping all has no loss
    values = values - price * mx.arange(1, top_k + 1)
    return top_k - mx.argmax(values[:, ::-1], axis=-1, keepdims=True)  # ties go to the larger number


def protected(h: Array, received: Array, share: float) -> Array:
    """Whether each token is one of the `share` that matter most, (tokens, 1), by the size of its input h (tokens, dim)
    and the attention that it receives from each of the tokens that could attend to it."""
    tokens, share = len(h), float(np.float32(share))  # as the core has it
    worth = mx.abs(h).sum(-1) * received / mx.arange(tokens, 0, -1)
    at = mx.arange(tokens)
    before = (worth > worth[:, None]) | ((worth == worth[:, None]) & (at < at[:, None]))
    return (before.sum(-1) < min(tokens, math.ceil(share * tokens)))[:, None]


def keep_first(ids: Array, weights: Array, kept: Array, renormalise: bool) -> tuple[Array, Array, Array]:
    """ids and weights of the first `kept` (tokens, 1) experts of each token, and the share of weight left out."""
    stays = mx.arange(weights.shape[1]) < kept
    left, every = mx.where(stays, weights, 0.0), weights.sum(-1, keepdims=True)
    of_left = left.sum(-1, keepdims=True)
    dropped = mx.where(of_left < every, 1 - of_left / mx.where(every > 0, every, 1), 0.0)
    if renormalise:
        left = left * mx.where(of_left < every, every / mx.maximum(of_left, 1e-20), 1.0)
    return mx.where(stays, ids, -1), left, dropped[:, 0]
