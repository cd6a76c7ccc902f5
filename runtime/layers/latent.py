"""Multi-head latent attention (MLA): keys and values come from one latent per token, which alone is cached."""

from dataclasses import dataclass, replace

import numpy as np

from .arrays import array, rms_norm
from .attention import attend_all
from .indexer import Choice, Indexer, chosen
from .past import NO_PAST, Past
from .rope import Rope, rotate


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """The parameters of one layer's attention over a latent; sizes are in elements."""

    heads: int
    q_rank: int  # size of the queries' latent; 0: queries are projected from the input
    kv_rank: int  # size of the keys' and values' latent
    nope_dim: int  # of a head's query and key: the part that is not rotated
    value_dim: int  # of a head's value
    rope: Rope  # of the rotated rest of a head's query, and of the one rotated key that all heads share
    norm_eps: float = 1e-6  # of both latents' norms, independent of the model's norm_eps
    query_growth: float = 0.0  # queries are multiplied by 1 + query_growth * log(1 + position // query_context)
    query_context: int = 1
    top: int = 0  # maximum of positions that a query attends to; 0: all
    indexer: Indexer | None = None  # chooses them; None: if there is a `top`, those that the layers before have chosen

    output = "o"  # the output projection
    output_bias = False

    @property
    def kv_heads(self) -> int:
        """The number of heads with different keys and values."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Size of a head's query and key."""
        return self.nope_dim + self.rope.dim

    @property
    def cached(self) -> int:
        """The number of values in the KV cache per token, without those of an indexer."""
        return self.kv_rank + self.rope.dim

    @property
    def softmax_scale(self) -> float:
        """The factor of the products of queries and keys."""
        return self.head_dim**-0.5 * self.rope.softmax_factor

    def query_scales(self, tokens: int) -> np.ndarray:
        """The factors of the queries at the first positions, float32 (tokens,)."""
        steps = np.arange(tokens) // self.query_context
        return (1 + self.query_growth * np.log1p(steps)).astype(np.float32)

    def planned(self, context: int) -> "LatentAttention":
        """The same in a run planned for `context` tokens."""
        indexer = replace(self.indexer, rope=self.indexer.rope.planned(context)) if self.indexer else None
        return replace(self, rope=self.rope.planned(context), indexer=indexer)

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors of this attention by canonical name, for a residual stream of `dim`, in the order of use."""
        q_rows = self.heads * self.head_dim
        parts: dict[str, tuple[int, ...]] = {"q": (q_rows, dim)}
        if self.q_rank:
            parts = {"q_a": (self.q_rank, dim), "q_a_norm": (self.q_rank,), "q_b": (q_rows, self.q_rank)}
        if self.indexer:
            parts |= self.indexer.shapes(dim, self.q_rank)
        return parts | {
            "kv_a": (self.cached, dim),
            "kv_a_norm": (self.kv_rank,),
            "kv_b": (self.heads * (self.nope_dim + self.value_dim), self.kv_rank),
            "o": (dim, self.heads * self.value_dim),
        }

    def kept(self, context: int) -> dict[str, tuple[int, ...]]:
        """See Attention.kept()."""
        index = {"index.k": (context, self.indexer.dim)} if self.indexer else {}
        return {"c": (context, self.kv_rank), "k_rope": (context, 1, self.rope.dim)} | index

    def stages(self) -> list[tuple[str, ...]]:
        """The matrices that may be rounded in the order of use, those with the same input together."""
        queries: list[tuple[str, ...]] = [("q_a",), ("q_b",)] if self.q_rank else [("q",)]
        if self.indexer:
            queries[-1] += ("index.q",)
        return [*queries, ("kv_a",), ("kv_b",), ("o",)]

    def pass_values(self, rows: int, tokens: int) -> int:
        """About how many values attended() holds at once for `rows` rows in sequences of `tokens`."""
        of_index = 2 * self.indexer.heads if self.indexer and tokens > self.top else 0
        return rows * 8 * self.heads * self.head_dim + max(3 * self.heads, of_index) * tokens * tokens

    def attended(self, trunk, times, h, eps: float, xp=np, choice: Choice | None = None, past: Past = NO_PAST):
        """Compute what Attention.attended() returns. choice: needed if other layers choose the positions."""
        c = rms_norm(times("q_a", h), trunk("q_a_norm"), self.norm_eps, xp) if self.q_rank else h
        visible = self._visible(trunk, times, h, c, xp, choice, past)
        q, latent, k_rope = self.rotated(trunk, times, h, c, xp, past)
        if past.matrix:
            return self._absorbed(past.matrix("kv_b"), q, latent, k_rope, xp, visible)
        q, k, v = self.qkv(times, q, latent, k_rope, xp)
        return attend_all(q, k, v, self.softmax_scale, xp=xp, visible=visible)

    def _visible(self, trunk, times, h, q_latent, xp, choice: Choice | None, past: Past):
        """Which positions each query attends to, as chosen() returns it; None: every position up to its own."""
        if not self.top:
            return None
        keys = self.indexer.keys(trunk, times, h, xp, past) if self.indexer else None
        if past.position + h.shape[1] <= self.top:
            return None
        if self.indexer is None:
            if choice is None:
                raise ValueError(f"a layer without an indexer attends to {self.top} positions that another has chosen")
            return choice.visible
        visible = chosen(self.indexer.scores(trunk, times, h, q_latent, keys, xp), self.top, xp=xp)
        if choice is not None:
            choice.visible = visible
        return visible

    def rotated(self, trunk, times, h, q_latent, xp=np, past: Past = NO_PAST):
        """Compute queries (sequences, tokens, heads, head_dim), and of all positions the latents (sequences, positions,
        kv_rank) and the rotated part of the keys (sequences, positions, 1, rope.dim).

        q_latent: (sequences, tokens, q_rank), or h if queries have no latent.
        """
        sequences, tokens, _ = h.shape
        q = times("q_b" if self.q_rank else "q", q_latent)
        kv = times("kv_a", h)  # (sequences, tokens, kv_rank + rope.dim)
        q = q.reshape(sequences, tokens, self.heads, self.head_dim)

        # the latents, and the rotated dimensions
        c = rms_norm(kv[..., : self.kv_rank], trunk("kv_a_norm"), self.norm_eps, xp)
        cos, sin = self.rope.tables(tokens, xp, past.position)
        q_rope = rotate(q[..., self.nope_dim :], cos, sin, xp, self.rope.interleaved)
        k_rope = rotate(kv[..., None, self.kv_rank :], cos, sin, xp, self.rope.interleaved)
        q = xp.concatenate([q[..., : self.nope_dim], q_rope], axis=-1)
        if self.query_growth:
            q = q * array(self.query_scales(past.position + tokens)[past.position :], xp)[:, None, None]
        return q, past.all("c", c), past.all("k_rope", k_rope)

    def qkv(self, times, q, latent, k_rope, xp=np):
        """Compute what Attention.qkv() returns, with the keys and values of all positions and heads expanded."""
        expanded = times("kv_b", latent).reshape(*latent.shape[:2], self.heads, self.nope_dim + self.value_dim)
        k_rope = xp.broadcast_to(k_rope, (*expanded.shape[:3], self.rope.dim))
        k = xp.concatenate([expanded[..., : self.nope_dim], k_rope], axis=-1)
        return q, k, expanded[..., self.nope_dim :]

    def _absorbed(self, kv_b, q, latent, k_rope, xp, visible):
        """attended() without the keys and values of each head: kv_b is applied to the queries, and to what they read.

        Both are then over the latents, which are keys and values of one head that all others share.
        """
        sequences, tokens = q.shape[:2]
        to_keys, to_values = (kv_b.of_heads(self.heads, *rows) for rows in ((0, self.nope_dim), (self.nope_dim, None)))
        over_latents = to_keys.times_transposed(q[..., : self.nope_dim].swapaxes(1, 2)).swapaxes(1, 2)
        q = xp.concatenate([over_latents, q[..., self.nope_dim :]], axis=-1)
        k, v = xp.concatenate([latent[:, :, None], k_rope], axis=-1), latent[:, :, None]
        y = attend_all(q, k, v, self.softmax_scale, xp=xp, visible=visible)
        y = to_values.times(y.reshape(sequences, tokens, self.heads, -1).swapaxes(1, 2)).swapaxes(1, 2)
        return y.reshape(sequences, tokens, -1)
