"""The lightning indexer of sparse attention (DeepSeek-V3.2): a query attends to the positions that it scores highest.

A few small heads score every earlier position for a query. Their keys, one of each position for all heads, are cached.
While a query sees at most as many positions as it may choose, it attends to all of them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import array, layer_norm
from .past import NO_PAST, Past
from .rope import Rope, rotate_first

SCORES = 1 << 21  # products of queries and keys, of all heads, that MLX may hold at once


@dataclass(frozen=True, slots=True)
class Indexer:
    """The parameters of one layer's indexer; sizes are in elements."""

    heads: int
    dim: int  # of a head's query, and of the key that all heads share
    rope: Rope  # of the first dimensions of both, with the angles of the layer's attention
    norm_eps: float = 1e-6  # of the keys' LayerNorm

    def shapes(self, dim: int, q_rank: int) -> dict[str, tuple[int, ...]]:
        """The indexer's tensors by canonical name, for a residual stream of `dim` and queries' latents of `q_rank`."""
        return {
            "index.q": (self.heads * self.dim, q_rank),
            "index.k": (self.dim, dim),
            "index.k_norm": (self.dim,),
            "index.k_norm_bias": (self.dim,),
            "index.weights": (self.heads, dim),
        }

    @property
    def scale(self) -> float:
        """The factor of the products of queries and keys."""
        return (self.dim * self.heads) ** -0.5

    def keys(self, trunk, times, h, xp=np, past: Past = NO_PAST):
        """The key of each position, (sequences, positions, dim). h: (sequences, tokens, dim), the attention's input."""
        k = layer_norm(times("index.k", h), trunk("index.k_norm"), trunk("index.k_norm_bias"), self.norm_eps, xp)
        cos, sin = self.rope.tables(h.shape[1], xp, past.position)
        return past.all("index.k", rotate_first(k[:, :, None], self.rope, cos, sin, xp)[:, :, 0])

    def scores(self, trunk, times, h, q_latent, k, xp=np):
        """The score of each position for each query, (sequences, queries, positions), later positions included.

        h: (sequences, tokens, dim), the attention's input; q_latent: (sequences, tokens, q_rank); k: keys(). A head's
        product of query and key counts if it is positive, times a weight that the head has for the query.
        """
        sequences, tokens, _ = h.shape
        q = times("index.q", q_latent).reshape(sequences, tokens, self.heads, self.dim)
        weights = times("index.weights", h)  # (sequences, tokens, heads)
        cos, sin = self.rope.tables(tokens, xp, k.shape[1] - tokens)
        q = rotate_first(q, self.rope, cos, sin, xp)
        return xp.stack([scores_of(q[i], k[i], weights[i], self.scale, xp) for i in range(sequences)])


def scores_of(q, k, weights, scale: float, xp=np):
    """The score of each key (keys, dim) for each query of one sequence, (queries, keys).

    q: (queries, heads, dim); weights: (queries, heads), of each head's product, which counts if it is positive.
    """
    rows, found = len(q) if xp is np else max(1, SCORES // (q.shape[1] * len(k))), []
    for at in range(0, len(q), rows):
        of_heads = xp.maximum(q[at : at + rows] @ k.T * scale, 0)  # (queries, heads, keys)
        found.append((weights[at : at + rows, None] @ of_heads)[:, 0])
    return found[0] if len(found) == 1 else xp.concatenate(found)


@dataclass(slots=True)
class Choice:
    """What the last layer with an indexer has chosen, for the layers after it that have none."""

    visible: Any = None  # see chosen(); None: every position up to the query's


def chosen(scores, top: int, seen=None, xp=np):
    """Whether each query attends to each position, bool (sequences, queries, positions).

    It attends to the `top` positions with the highest scores of those that it sees; ties go to the lower position.
    seen: bool (queries, positions); None: those up to the query's own, where the queries are those of the last
    positions.
    """
    queries, positions = scores.shape[1:]
    seen = array(np.tri(queries, positions, positions - queries, dtype=bool) if seen is None else seen, xp)
    worth = xp.where(seen, scores, -math.inf)
    least = xp.sort(worth, axis=-1)[..., -top:][..., :1]
    above, tied = worth > least, worth == least
    left = top - xp.sum(above, axis=-1, keepdims=True)
    return (above | (tied & (xp.cumsum(xp.where(tied, 1, 0), axis=-1) <= left))) & seen
