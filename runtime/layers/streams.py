"""A residual stream of several streams (arXiv 2409.19606, with gates in place of matrices): what a layer's attention or
MLP gets is a gated mean of all streams, and each stream gets a share of its own of what comes out.

The streams of a token lie one after the other, (..., streams * dim); all begin as the token's embedding.
"""

from dataclasses import dataclass

import numpy as np

from .arrays import product, rms_norm, sigmoid, silu


@dataclass(frozen=True, slots=True)
class Streams:
    """How many streams there are, and the rank of the gates' matrices."""

    count: int
    rank: int

    stages = ("down", "up")  # the matrices of a mix that may be rounded, in the order of use

    def shapes(self, name: str, dim: int, shares: bool = True) -> dict[str, tuple[int, ...]]:
        """The tensors of one mix, by canonical name: `name`_norm in place of a norm of the residual stream."""
        width = self.count * dim
        gates = {f"{name}_mix.down": (self.rank, width), f"{name}_mix.up": (width, self.rank)}
        return {f"{name}_norm": (width,), **gates} | ({f"{name}_mix.share": (self.count, width)} if shares else {})

    def normed(self, weights, name: str, x, eps: float, xp=np):
        """Each stream of x (..., width) with a root mean square of one, times the weights of the norm."""
        split = x.reshape(*x.shape[:-1], self.count, -1)
        return rms_norm(split, weights.trunk(f"{name}_norm").reshape(self.count, -1), eps, xp).reshape(x.shape)

    def mixed(self, weights, name: str, x, eps: float, xp=np):
        """The input of attention, MLP or head, (..., dim), from x (..., width)."""
        h = self.normed(weights, name, x, eps, xp)
        low = silu(product(weights, f"{name}_mix.down", h, xp) / self.count, xp)
        gates = sigmoid(product(weights, f"{name}_mix.up", low, xp), xp)
        return xp.mean((gates * h).reshape(*x.shape[:-1], self.count, -1), axis=-2)

    def shares(self, weights, name: str, x, eps: float, xp=np):
        """How much of an output each stream gets, (..., streams), from 0 to 2, by x (..., width) before it."""
        h = self.normed(weights, name, x, eps, xp)
        return 2 * sigmoid(product(weights, f"{name}_mix.share", h, xp) / self.count, xp)

    def added(self, weights, name: str, x, y, eps: float, xp=np):
        """x (..., width) with each stream's share of an output y (..., dim)."""
        shares = self.shares(weights, name, x, eps, xp)
        return x + (shares[..., None] * y[..., None, :]).reshape(x.shape)
