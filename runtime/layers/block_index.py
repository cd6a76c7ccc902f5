"""Block-sparse attention: which earlier positions a query sees, chosen block by block by the scores of an index.

The index has a few heads of queries and one key for each block of consecutive positions, the mean of a small key of
each of them. A query sees the blocks with the best scores, and the positions after the last whole block.
"""

from dataclasses import dataclass

import numpy as np

from .arrays import array, rms_norm
from .indexer import chosen
from .past import NO_PAST, Past
from .rope import Rope, rotate_first


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """The parameters of the index of one layer's attention; sizes are in elements."""

    heads: int
    head_dim: int
    block: int  # positions of a block
    blocks: int  # maximum of whole blocks that a query sees

    @property
    def scale(self) -> float:
        """The factor of the products of queries and keys."""
        return self.head_dim**-0.5

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors by canonical name, for inputs of `dim`, in the order of use."""
        return {
            "index.q": (self.heads * self.head_dim, dim),
            "index.k": (self.head_dim, dim),
            "index.q_norm": (self.head_dim,),
            "index.k_norm": (self.head_dim,),
        }

    def seen(self, trunk, times, h, rope: Rope, eps: float, xp=np, past: Past = NO_PAST):
        """Whether each query sees each position, bool (sequences, queries, positions).

        h: (sequences, tokens, dim). Of blocks with equal scores the first is chosen.
        """
        sequences, tokens, _ = h.shape
        positions = past.position + tokens
        cos, sin = rope.tables(tokens, xp, past.position)
        q = times("index.q", h).reshape(sequences, tokens, self.heads, self.head_dim)
        q = rotate_first(rms_norm(q, trunk("index.q_norm"), eps, xp), rope, cos, sin, xp)

        keys = past.all("index.k", times("index.k", h))
        whole, at = positions // self.block, np.arange(past.position, positions)[:, None]
        causal = np.broadcast_to(np.arange(positions) <= at, (sequences, tokens, positions))
        if whole <= self.blocks:
            return causal
        k = keys[:, : whole * self.block].reshape(sequences, whole, self.block, self.head_dim)
        k = rms_norm(xp.mean(k, axis=2), trunk("index.k_norm"), eps, xp)[:, :, None]
        cos, sin = rope.tables(positions, xp)
        starts = slice(0, whole * self.block, self.block)
        k = rotate_first(k, rope, cos[starts], sin[starts], xp)[:, :, 0]  # (sequences, whole, head_dim)

        products = q.swapaxes(1, 2) @ k.swapaxes(1, 2)[:, None]  # (sequences, heads, tokens, whole)
        scores = xp.sum(xp.maximum(products * self.scale, array(np.float32(0), xp)), axis=1)
        before = (at + 1) // self.block  # whole blocks that end at the query or before it
        there = np.arange(whole) < before
        of_blocks = xp.repeat(chosen(scores, self.blocks, there, xp), self.block, axis=-1)
        tail = array(np.arange(positions) >= before * self.block, xp)
        rest = xp.zeros((*of_blocks.shape[:2], positions - whole * self.block), dtype=xp.bool_)
        padded = xp.concatenate([of_blocks, rest], axis=-1)
        return array(causal, xp) & (padded | tail)
