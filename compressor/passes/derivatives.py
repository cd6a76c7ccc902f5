"""Derivatives of functions of runtime/layers/arrays.py. g (..., rows, dim): a gradient at an output."""

import numpy as np

from ...runtime.layers.arrays import sigmoid


def rms_norm_backward(x, weight, eps: float, g):
    """The gradient at x (..., dim), of which rms_norm(x, weight, eps) is taken."""
    g = g * weight
    inverse = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)
    return inverse * (g - x * (np.square(inverse) * np.mean(g * x, axis=-1, keepdims=True)))


def softmax_backward(y, g):
    """The gradient at x, of which y = softmax(x) is given."""
    return y * (g - (g * y).sum(axis=-1, keepdims=True))


def swish(x, alpha: float):
    """x * sigmoid(alpha * x) and its derivative."""
    gate = sigmoid(alpha * x)
    return x * gate, gate * (1 + alpha * x * (1 - gate))
