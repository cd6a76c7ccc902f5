"""The backward pass through a residual stream of several streams: runtime/layers/streams.py and hyper.py.

x: (rows, width), the streams; g (..., rows, dim) at what attention, MLP or head gets of them, or (..., rows, width) at
the streams with an output added. Gradients are returned in the shape of g.
"""

import numpy as np

from ...runtime.layers.arrays import sigmoid, softmax
from ...runtime.layers.hyper import HyperConnections
from ...runtime.layers.streams import Streams
from .derivatives import rms_norm_backward, softmax_backward, swish


def input_backward(streams: Streams | HyperConnections, weights, name: str, x, eps: float, g):
    """Backward of mixed(): the gradient at x, (..., rows, width)."""
    of = _gated_input if isinstance(streams, Streams) else _summed_input
    return of(streams, weights, name, x, eps, g)


def output_backward(streams: Streams | HyperConnections, weights, name: str, x, y, eps: float, g):
    """Backward of added(): the gradients at y (rows, dim) and at x, given g (..., rows, width)."""
    of = _gated_output if isinstance(streams, Streams) else _mixed_output
    return of(streams, weights, name, x, y, eps, g)


def pass_backward(streams: Streams | HyperConnections, mixing, g):
    """The gradient (rows, width) at the streams before attention, given g at those after it, but for what attention and
    the weights of the mix make of them. mixing: (rows, from, to) of HyperConnections."""
    if isinstance(streams, Streams):
        return g
    split = g.reshape(len(g), streams.count, -1)
    return (mixing @ split).reshape(g.shape)


# ---- Streams


def _gated_input(streams: Streams, weights, name: str, x, eps: float, g):
    down, up = (weights.trunk(f"{name}_mix.{part}") for part in ("down", "up"))
    h = streams.normed(weights, name, x, eps)  # (rows, width)
    inner, slope = swish(h @ down.T / streams.count, 1)
    gates = sigmoid(inner @ up.T)
    g = np.concatenate([g] * streams.count, axis=-1) / streams.count  # of gates * h
    g_low = ((g * h * gates * (1 - gates)) @ up) * slope
    return _normed(streams, weights, name, x, eps, g * gates + g_low @ down / streams.count)


def _gated_output(streams: Streams, weights, name: str, x, y, eps: float, g):
    shares = streams.shares(weights, name, x, eps)  # (rows, streams)
    split = g.reshape(*g.shape[:-1], streams.count, -1)
    g_shares = (split * y[:, None]).sum(-1) * shares * (1 - shares / 2) / streams.count
    of_shares = _normed(streams, weights, name, x, eps, g_shares @ weights.trunk(f"{name}_mix.share"))
    return (split * shares[..., None]).sum(-2), g + of_shares


def _normed(streams: Streams, weights, name: str, x, eps: float, g):
    """Backward of Streams.normed()."""
    split, its = (*g.shape[:-1], streams.count, -1), x.reshape(len(x), streams.count, -1)
    weight = weights.trunk(f"{name}_norm").reshape(streams.count, -1)
    return rms_norm_backward(its, weight, eps, g.reshape(split)).reshape(g.shape)


# ---- HyperConnections


def _summed_input(streams: HyperConnections, weights, name: str, x, eps: float, g):
    count, split = streams.count, x.reshape(len(x), streams.count, -1)
    share = sigmoid(streams.parts(weights, name, x, eps)[0])  # (rows, streams)
    whole = (share + streams.eps)[..., None]
    g = rms_norm_backward((whole * split).sum(-2), weights.trunk(f"{name}_norm"), eps, g)[..., None, :]
    g_parts = np.zeros((*g.shape[:-2], len(weights.trunk(f"{name}_mix.base"))), np.float32)
    g_parts[..., :count] = (g * split).sum(-1) * share * (1 - share)
    return (whole * g).reshape(*g.shape[:-2], -1) + _parts(weights, name, x, eps, count, g_parts)


def _mixed_output(streams: HyperConnections, weights, name: str, x, y, eps: float, g):
    count, split = streams.count, x.reshape(len(x), streams.count, -1)
    _, of_shares, of_mixing = streams.parts(weights, name, x, eps)
    share = 2 * sigmoid(of_shares)
    start = softmax(of_mixing.reshape(len(x), count, count))
    mixing, steps = _balanced(streams, start + streams.eps)
    g = g.reshape(*g.shape[:-1], count, -1)
    g_share = (g * y[:, None]).sum(-1) * share * (1 - share / 2)
    g_mixing = split @ g.swapaxes(-1, -2)  # (..., rows, from, to)
    for after, axis, total in reversed(steps):
        g_mixing = (g_mixing - (g_mixing * after).sum(axis, keepdims=True)) / total
    g_start = softmax_backward(start, g_mixing)
    g_parts = np.concatenate([np.zeros_like(g_share), g_share, g_start.reshape(*g_share.shape[:-1], -1)], axis=-1)
    g_x = (mixing @ g).reshape(*g.shape[:-2], -1) + _parts(weights, name, x, eps, count, g_parts)
    return (g * share[..., None]).sum(-2), g_x


def _balanced(streams: HyperConnections, y):
    """HyperConnections.mixing() from its start on, and each step: the result, the axis whose sums become one, and the
    sums before."""
    steps = []
    for time in range(streams.iterations):
        for axis in (-1, -2) if time else (-2,):
            total = y.sum(axis, keepdims=True) + streams.eps
            y = y / total
            steps.append((y, axis, total))
    return y, steps


def _parts(weights, name: str, x, eps: float, count: int, g):
    """Backward of HyperConnections.parts(), all in one: g (..., rows, weights of a mix)."""
    scale = weights.trunk(f"{name}_mix.scale")
    scales = np.repeat(scale, [count, count, g.shape[-1] - 2 * count][: len(scale)])
    return rms_norm_backward(x, np.float32(1), eps, (g * scales) @ weights.trunk(f"{name}_mix.weights"))
