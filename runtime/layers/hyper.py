"""Manifold-constrained hyper-connections (arXiv 2512.24880): a residual stream of several streams, which are mixed.

What attention, MLP or head gets is a weighted sum of the streams. What comes out is added to each stream by a weight of
its own, to the streams mixed by a matrix whose rows and columns sum to one. A token's weights come from its streams.
The streams of a token lie one after the other, (..., streams * dim); all begin as the token's embedding.
"""

from dataclasses import dataclass

import numpy as np

from .arrays import array, product, rms_norm, sigmoid, softmax


@dataclass(frozen=True, slots=True)
class HyperConnections:
    """How many streams there are, and how the matrices that mix them are made."""

    count: int
    iterations: int  # of Sinkhorn and Knopp's: the sums of columns and, but for the first time, of rows become one
    eps: float  # added to the weights of the sum, and to what the others are divided by

    stages = ()  # see Streams: none is rounded

    def shapes(self, name: str, dim: int, shares: bool = True) -> dict[str, tuple[int, ...]]:
        """The tensors of one mix, by canonical name: `name`_norm is the norm of the sum. shares: something is added."""
        weights, scales = (self.count * (2 + self.count), 3) if shares else (self.count, 1)
        mix = f"{name}_mix"
        return {
            f"{name}_norm": (dim,),
            f"{mix}.weights": (weights, self.count * dim),
            f"{mix}.base": (weights,),
            f"{mix}.scale": (scales,),
        }

    def mixed(self, weights, name: str, x, eps: float, xp=np):
        """The input of attention, MLP or head, (..., dim), from x (..., width)."""
        return rms_norm(self.summed(weights, name, x, eps, xp), weights.trunk(f"{name}_norm"), eps, xp)

    def summed(self, weights, name: str, x, eps: float, xp=np):
        """The weighted sum of the streams of x (..., width), (..., dim), which is normed."""
        share = sigmoid(self.parts(weights, name, x, eps, xp)[0], xp) + self.eps
        return xp.sum(share[..., None] * x.reshape(*x.shape[:-1], self.count, -1), axis=-2)

    def shares(self, weights, name: str, x, eps: float, xp=np):
        """How much of an output each stream gets, (..., streams), from 0 to 2, by x (..., width) before it."""
        return 2 * sigmoid(self.parts(weights, name, x, eps, xp)[1], xp)

    def mixing(self, weights, name: str, x, eps: float, xp=np):
        """How the streams of x (..., width) are mixed, (..., from, to)."""
        *_, mix = self.parts(weights, name, x, eps, xp)
        y = softmax(mix.reshape(*mix.shape[:-1], self.count, self.count), xp) + self.eps
        for time in range(self.iterations):
            if time:
                y = y / (xp.sum(y, axis=-1, keepdims=True) + self.eps)
            y = y / (xp.sum(y, axis=-2, keepdims=True) + self.eps)
        return y

    def added(self, weights, name: str, x, y, eps: float, xp=np):
        """The streams of x (..., width), mixed, with each one's share of an output y (..., dim)."""
        shares, mixing = (of(weights, name, x, eps, xp) for of in (self.shares, self.mixing))
        split = x.reshape(*x.shape[:-1], self.count, -1)
        return (mixing.swapaxes(-1, -2) @ split + shares[..., None] * y[..., None, :]).reshape(x.shape)

    def parts(self, weights, name: str, x, eps: float, xp=np):
        """What the weights of a mix are made of: of the sum and, if something is added, of shares and mixing."""
        h = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)
        y, base = product(weights, f"{name}_mix.weights", h, xp), array(weights.trunk(f"{name}_mix.base"), xp)
        scale, parts, count = array(weights.trunk(f"{name}_mix.scale"), xp), [], self.count
        for at, (first, last) in enumerate(((0, count), (count, 2 * count), (2 * count, len(base)))):
            if first < len(base):
                parts.append(y[..., first:last] * scale[at] + base[first:last])
        return parts
