"""Attention over a window and over compressed rows, each of which stands for the tokens of a stretch (DeepSeek-V4).

One row per token is key and value of all heads. A compressed row is a mean of its stretch's tokens, weighted in each
dimension by a softmax of gates; overlapping rows also take the tokens of the stretch before. A query sees the rows of
its window and the compressed rows of all stretches that are over, or those of them that an index scores highest.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from .arrays import array, rms_norm, softmax
from .attention import attend_all
from .indexer import Choice, chosen, scores_of
from .past import NO_PAST, Past
from .rope import Rope, rotate_last


@dataclass(frozen=True, slots=True)
class CompressedIndex:
    """The parameters of the index of one layer's compressed rows; sizes are in elements.

    A few heads score each compressed row by a smaller one that is made of the same tokens.
    """

    heads: int
    dim: int  # of a head's query, and of the smaller row that all heads share
    top: int  # maximum of compressed rows that a query sees

    @property
    def scale(self) -> float:
        """The factor of the products of queries and rows."""
        return (self.dim * self.heads) ** -0.5


@dataclass(frozen=True, slots=True)
class CompressedAttention:
    """The parameters of one layer's attention over a window and compressed rows; sizes are in elements."""

    heads: int
    q_rank: int  # size of the queries' latent
    head_dim: int  # of a head's query, and of a row, which is the key and the value of all heads
    rope: Rope  # of the last dimensions of queries, rows and compressed rows, and of the index's
    window: int  # rows a query can see, its own included
    groups: int  # of heads, whose outputs are projected apart
    group_rank: int  # what the outputs of a group are projected to
    rate: int = 0  # tokens of a compressed row; 0: there are none
    overlapped: bool = False  # a compressed row takes the tokens before its own, too, by columns for that
    index: CompressedIndex | None = None  # chooses the compressed rows that a query sees; None: it sees all

    kv_heads = 1
    grouped = "o_a"  # the matrix whose rows are in groups, each with inputs of its own
    output = "o"  # the output projection
    output_bias = False

    @property
    def value_dim(self) -> int:
        """Size of a head's value."""
        return self.head_dim

    @property
    def softmax_scale(self) -> float:
        """The factor of the products of queries and keys."""
        return self.head_dim**-0.5 * self.rope.softmax_factor

    @property
    def tokens_before(self) -> int:
        """How many tokens before the first that is computed a compressed row of it may take."""
        return (2 if self.overlapped else 1) * self.rate - 1 if self.rate else 0

    def planned(self, context: int) -> "CompressedAttention":
        """The same in a run planned for `context` tokens."""
        return replace(self, rope=self.rope.planned(context))

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors of this attention by canonical name, for a residual stream of `dim`, in the order of use."""
        rows, times = self.heads * self.head_dim, 2 if self.overlapped else 1
        parts: dict[str, tuple[int, ...]] = {
            "q_a": (self.q_rank, dim),
            "q_a_norm": (self.q_rank,),
            "q_b": (rows, self.q_rank),
            "kv": (self.head_dim, dim),
            "kv_norm": (self.head_dim,),
            "sinks": (self.heads,),
        }
        if self.rate:
            parts |= {f"pool.{part}": (times * self.head_dim, dim) for part in ("kv", "gate")}
            parts |= {"pool.bias": (self.rate, times * self.head_dim), "pool.norm": (self.head_dim,)}
        if its := self.index:
            parts |= {"index.q": (its.heads * its.dim, self.q_rank)}
            parts |= {f"index.{part}": (times * its.dim, dim) for part in ("kv", "gate")}
            parts |= {"index.bias": (self.rate, times * its.dim), "index.k_norm": (its.dim,)}
            parts |= {"index.weights": (its.heads, dim)}
        return parts | {
            "o_a": (self.groups * self.group_rank, rows // self.groups),
            "o": (dim, self.groups * self.group_rank),
        }

    def kept(self, context: int) -> dict[str, tuple[int, ...]]:
        """See Attention.kept()."""
        stretches = context // self.rate if self.rate else 0
        parts: dict[str, tuple[int, ...]] = {"rows": (context, 1, self.head_dim)}
        parts |= {"pool": (stretches, self.head_dim)} if self.rate else {}
        return parts | ({"index": (stretches, self.index.dim)} if self.index else {})

    def stages(self) -> list[tuple[str, ...]]:
        """The matrices that may be rounded in the order of use, those with the same input together."""
        pool, index = ("pool.kv", "pool.gate") if self.rate else (), ("index.q",) if self.index else ()
        return [("q_a", "kv", *pool), ("q_b", *index), ("o_a",), ("o",)]

    def pass_values(self, rows: int, tokens: int) -> int:
        """About how many values attended() holds at once for `rows` rows in sequences of `tokens`."""
        compressed = tokens // self.rate if self.rate else 0
        scores = max(3 * self.heads * (tokens + compressed), 2 * self.index.heads * compressed if self.index else 0)
        return rows * 8 * (self.heads + (4 if self.overlapped else 2)) * self.head_dim + scores * tokens

    def attended(self, trunk, times, h, eps: float, xp=np, choice: Choice | None = None, past: Past = NO_PAST):
        """Compute the input of the output projection, (sequences, tokens, groups * group_rank).

        h: (sequences, tokens, dim). trunk(name) is a tensor of the layer, times(name, x) the product of x with a matrix
        of the layer, with grouped=True as grouped_product().
        """
        sequences, tokens, _ = h.shape
        cos, sin = self.rope.tables(tokens, xp, past.position)

        # queries, and the row of each token
        latent = rms_norm(times("q_a", h), trunk("q_a_norm"), eps, xp)
        q = times("q_b", latent).reshape(sequences, tokens, self.heads, self.head_dim)
        q = rotate_last(rms_norm(q, np.ones(self.head_dim, np.float32), eps, xp), self.rope, cos, sin, xp)
        rows = rms_norm(times("kv", h), trunk("kv_norm"), eps, xp)[:, :, None]
        first = max(0, past.position - self.window + 1)  # that a query sees
        rows = past.all("rows", rotate_last(rows, self.rope, cos, sin, xp))[:, first:]

        # compressed rows, and which of all rows a query sees
        at = np.arange(past.position, past.position + tokens)[:, None]
        age = at - np.arange(first, past.position + tokens)
        seen = array(np.broadcast_to((age >= 0) & (age < self.window), (sequences, *age.shape)), xp)
        compressed = self.compressed(trunk, times, h, "pool", self.head_dim, eps, xp, past)
        visible = self._visible(trunk, times, h, latent, eps, xp, past)
        if compressed is not None:
            seen = xp.concatenate([xp.broadcast_to(visible, (sequences, *visible.shape[-2:])), seen], axis=-1)
            rows = xp.concatenate([compressed[:, :, None], rows], axis=1)

        # attention, whose outputs are turned back as the rows were turned
        y = attend_all(q, rows, rows, self.softmax_scale, 0, xp, trunk("sinks"), seen)
        y = y.reshape(sequences, tokens, self.heads, self.head_dim)
        y = rotate_last(y, self.rope, cos, sin, xp, back=True).reshape(sequences, tokens, self.groups, -1)
        return times("o_a", y, grouped=True).reshape(sequences, tokens, -1)

    def compressed(self, trunk, times, h, name: str, size: int, eps: float, xp=np, past: Past = NO_PAST):
        """The compressed rows of all stretches that are over, (sequences, stretches, size); None if there are none.

        h: (sequences, tokens, dim). name: pool, or index for the smaller ones.
        """
        if not self.rate:
            return None
        before = int(self.overlapped)  # stretches before its own that a row takes
        first, over = past.position // self.rate, (past.position + h.shape[1]) // self.rate
        kept = self.tokens_before
        kv, gate = (past.latest(f"{name}.{part}", times(f"{name}.{part}", h), kept, xp) for part in ("kv", "gate"))
        if over == first:
            return past.all(name, None, first)
        begin = (first - before) * self.rate - (past.position - kept)
        count = over - first + before
        kv, gate = (
            part[:, begin : begin + count * self.rate].reshape(len(h), count, self.rate, -1) for part in (kv, gate)
        )
        gate = gate + trunk(f"{name}.bias")
        if before:
            there = array(np.arange(first, over)[:, None, None] > 0, xp)  # the first stretch has none before it
            kv = xp.concatenate([kv[:, :-1, :, :size], kv[:, 1:, :, size:]], axis=2)
            of_before = xp.where(there, gate[:, :-1, :, :size], -math.inf)
            gate = xp.concatenate([of_before, gate[:, 1:, :, size:]], axis=2)
        share = softmax(gate.swapaxes(2, 3), xp)
        norm = "pool.norm" if name == "pool" else "index.k_norm"
        mean = rms_norm(xp.sum(kv.swapaxes(2, 3) * share, axis=-1), trunk(norm), eps, xp)
        cos, sin = (part[:: self.rate] for part in self.rope.tables((over - first) * self.rate, xp, first * self.rate))
        return past.all(name, rotate_last(mean[:, :, None], self.rope, cos, sin, xp)[:, :, 0], first)

    def _visible(self, trunk, times, h, latent, eps: float, xp, past: Past = NO_PAST):
        """Whether each query sees each compressed row, bool (queries, rows) or (sequences, queries, rows)."""
        if not self.rate:
            return None
        sequences, tokens, _ = h.shape
        its, positions = self.index, past.position + tokens
        over = np.arange(positions // self.rate) < (np.arange(past.position, positions)[:, None] + 1) // self.rate
        if its is None:
            return array(over, xp)
        k = self.compressed(trunk, times, h, "index", its.dim, eps, xp, past)
        if over.shape[1] <= its.top:
            return array(over, xp)
        cos, sin = self.rope.tables(tokens, xp, past.position)
        q = times("index.q", latent).reshape(sequences, tokens, its.heads, its.dim)
        q = rotate_last(q, self.rope, cos, sin, xp)
        weights = times("index.weights", h)  # (sequences, tokens, heads)
        scores = [scores_of(q[i], k[i], weights[i], its.scale, xp) for i in range(sequences)]
        return chosen(xp.stack(scores), its.top, over, xp)
