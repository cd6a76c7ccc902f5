"""Grouped-query attention: each KV head has its own keys and values, and those of all tokens are cached."""

import math
from dataclasses import dataclass, replace

import numpy as np

from .arrays import array, rms_norm, sigmoid, softmax
from .block_index import BlockIndex
from .indexer import Choice
from .past import NO_PAST, Past
from .rope import Rope, rotate_first


@dataclass(frozen=True, slots=True)
class Attention:
    """The parameters of one layer's attention; sizes are in elements."""

    heads: int
    kv_heads: int
    head_dim: int  # of queries, keys and values
    rope: Rope
    bias: bool = False  # of q, k and v
    output_bias: bool = False
    qk_norm: str = "none"  # none | head (one norm per head) | full (over all heads at once)
    norm_after_rope: bool = False  # the norms of q and k per head follow the rotation, else precede it
    clip: float = 0.0  # q, k and v are clipped to +-this after the norm; 0 is off
    window: int = 0  # keys a query can see, itself included; 0 is all
    scale: float = 0.0  # factor of the products of queries and keys; 0 is head_dim ** -0.5
    keys_as_values: bool = False  # values are the projections of the keys, before their norm and rotation
    v_norm: bool = False  # values are scaled to a root mean square of one, per head
    output_gate: bool = False  # the input of the output projection is multiplied by a sigmoid gate
    sinks: bool = False  # each head has a logit of its own in the softmax, which takes weight from the values
    index: BlockIndex | None = None  # chooses the positions that a query sees

    output = "o"  # the output projection

    @property
    def softmax_scale(self) -> float:
        """The factor of the products of queries and keys."""
        return (self.scale or self.head_dim**-0.5) * self.rope.softmax_factor

    @property
    def value_dim(self) -> int:
        """Size of a head's value."""
        return self.head_dim

    def planned(self, context: int) -> "Attention":
        """The same in a run planned for `context` tokens."""
        return replace(self, rope=self.rope.planned(context))

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors of this attention by canonical name, for a residual stream of `dim`, in the order of use."""
        q_rows, kv_rows, full = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.qk_norm == "full"
        rows = {"q": q_rows, "k": kv_rows} | ({} if self.keys_as_values else {"v": kv_rows})
        parts: dict[str, tuple[int, ...]] = {part: (count, dim) for part, count in rows.items()}
        if self.output_gate:
            parts |= {"o_gate": (q_rows, dim)}
        if self.bias:
            parts |= {f"{part}_bias": (count,) for part, count in rows.items()}
        if self.qk_norm != "none":
            parts |= {"q_norm": (q_rows if full else self.head_dim,), "k_norm": (kv_rows if full else self.head_dim,)}
        parts |= {"sinks": (self.heads,)} if self.sinks else {}
        parts |= self.index.shapes(dim) if self.index else {}
        parts |= {"o": (dim, q_rows)}
        return parts | ({"o_bias": (dim,)} if self.output_bias else {})

    def kept(self, context: int) -> dict[str, tuple[int, ...]]:
        """The shapes of what attended() needs of `context` earlier tokens, by the names that its Past has for them."""
        rows, index = (context, self.kv_heads, self.head_dim), self.index
        return {"k": rows, "v": rows} | ({"index.k": (context, index.head_dim)} if index else {})

    def stages(self) -> list[tuple[str, ...]]:
        """The matrices that may be rounded in the order of use, those with the same input together."""
        own = {"v": not self.keys_as_values, "o_gate": self.output_gate}
        index = ("index.q",) if self.index else ()
        return [("q", "k", *(name for name, present in own.items() if present), *index), ("o",)]

    def pass_values(self, rows: int, tokens: int) -> int:
        """About how many values attended() holds at once for `rows` rows in sequences of `tokens`."""
        return rows * 8 * self.heads * self.head_dim + 3 * self.heads * tokens * tokens

    def attended(self, trunk, times, h, eps: float, xp=np, choice: Choice | None = None, past: Past = NO_PAST):
        """Compute the input of the output projection, (sequences, tokens, heads * value_dim); see qkv()."""
        sinks = trunk("sinks") if self.sinks else None
        seen = self.index.seen(trunk, times, h, self.rope, eps, xp, past) if self.index else None
        q, k, v = self.qkv(trunk, times, h, eps, xp, past.position)
        k, v = past.all("k", k), past.all("v", v)
        if past.is_received:
            past.received = received(q[0], k[0], self.softmax_scale, self.window, xp, sinks)
        y = attend_all(q, k, v, self.softmax_scale, self.window, xp, sinks, seen)
        return y * sigmoid(times("o_gate", h), xp) if self.output_gate else y

    def qkv(self, trunk, times, h, eps: float, xp=np, first: int = 0):
        """Compute queries, keys and values of h (sequences, tokens, dim), and rotate queries and keys by position, of
        which the first token has `first`.

        trunk(name) is a tensor of the layer, times(name, x) the product of x with a matrix of the layer. Returns arrays
        (sequences, tokens, heads or kv_heads, head_dim).
        """
        sequences, tokens, _ = h.shape

        def projected(part: str):
            return times(part, h) + trunk(f"{part}_bias") if self.bias else times(part, h)

        q, k = projected("q"), projected("k")
        v = k if self.keys_as_values else projected("v")
        if self.qk_norm == "full":
            q, k = rms_norm(q, trunk("q_norm"), eps, xp), rms_norm(k, trunk("k_norm"), eps, xp)
        if self.clip:
            q, k, v = (xp.clip(part, -self.clip, self.clip) for part in (q, k, v))
        q, k, v = (part.reshape(sequences, tokens, -1, self.head_dim) for part in (q, k, v))
        if self.qk_norm == "head" and not self.norm_after_rope:
            q, k = rms_norm(q, trunk("q_norm"), eps, xp), rms_norm(k, trunk("k_norm"), eps, xp)
        if self.v_norm:
            v = rms_norm(v, np.ones(self.head_dim, np.float32), eps, xp)
        cos, sin = self.rope.tables(tokens, xp, first)
        q, k = (rotate_first(part, self.rope, cos, sin, xp) for part in (q, k))
        if self.qk_norm == "head" and self.norm_after_rope:
            q, k = rms_norm(q, trunk("q_norm"), eps, xp), rms_norm(k, trunk("k_norm"), eps, xp)
        return q, k, v


SCORES = 1 << 21  # products of queries and keys, of all heads, that attend_mlx() may hold at once


def attend_all(q, k, v, scale: float, window: int = 0, xp=np, sinks=None, visible=None):
    """attend() for each sequence, one at a time, so that memory holds the scores of only one."""
    if xp is not np:
        return attend_mlx(q, k, v, scale, window, xp, sinks, visible)
    each = range(len(q))
    return xp.stack(
        [attend(q[i], k[i], v[i], scale, window, xp, sinks, None if visible is None else visible[i]) for i in each]
    )


def attend_mlx(q, k, v, scale: float, window: int, xp, sinks=None, visible=None):
    """attend_all() by MLX's own attention, some queries at a time, each with the keys that they may see."""
    sequences, tokens, heads, _ = q.shape
    before = k.shape[1] - tokens
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    rows, parts = max(1, SCORES // (heads * (before + tokens))), []
    for at in range(0, tokens, rows):
        end = min(at + rows, tokens)
        low, high = max(0, before + at - window + 1) if window else 0, before + end
        mask = "causal" if end - at > 1 else None
        if visible is not None:
            mask = array(visible, xp)[:, None, at:end, low:high]
        elif window and end - at > 1:
            age = np.arange(before + at, high)[:, None] - np.arange(low, high)
            mask = xp.array((age >= 0) & (age < window))
        seen = (part[:, :, low:high] for part in (k, v))
        attention = xp.fast.scaled_dot_product_attention
        parts.append(attention(q[:, :, at:end], *seen, scale=scale, mask=mask, sinks=sinks))
    y = parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=2)
    return y.swapaxes(1, 2).reshape(sequences, tokens, -1)


def attend(q, k, v, scale: float, window: int = 0, xp=np, sinks=None, visible=None):
    """Causal attention within one sequence: q (tokens, heads, head_dim), k and v (positions, kv_heads, size of each).

    The queries are those of the last positions. Returns (tokens, heads * v's size). Query head i reads key head
    i // (heads / kv_heads). window: keys a query can see, itself included; 0 is all. sinks: (heads,), a logit of each
    head that has no value; None: none. visible: bool (queries, positions), the positions that a query can see, if these
    are not all in its window.
    """
    tokens, heads, head_dim = q.shape
    positions, kv_heads, v_dim = v.shape
    q = q.transpose(1, 0, 2).reshape(kv_heads, heads // kv_heads, tokens, head_dim)
    k = k.transpose(1, 2, 0)[:, None]  # (kv_heads, 1, head_dim, positions)
    v = v.transpose(1, 0, 2)[:, None]  # (kv_heads, 1, positions, v_dim)

    age = np.arange(positions - tokens, positions)[:, None] - np.arange(positions)  # (query, key)
    visible = (age >= 0) & (age < (window or positions)) if visible is None else visible
    scores = xp.where(array(visible, xp), q @ k * scale, -math.inf)
    sinks = None if sinks is None else sinks.reshape(kv_heads, heads // kv_heads, 1, 1)
    y = softmax(scores, xp, sinks) @ v  # (kv_heads, heads / kv_heads, tokens, v_dim)
    return y.reshape(heads, tokens, v_dim).transpose(1, 0, 2).reshape(tokens, heads * v_dim)


def received(q, k, scale: float, window: int = 0, xp=np, sinks=None):
    """The attention that each token of a sequence receives from itself and later ones, (tokens,), as the mean of heads.

    See attend(); computed head by head.
    """
    (tokens, heads, _), positions = q.shape, len(k)
    age = np.arange(positions - tokens, positions)[:, None] - np.arange(positions)
    visible, total = array((age >= 0) & (age < (window or positions)), xp), 0
    for head in range(heads):
        keys = k[:, head // (heads // k.shape[1])]
        scores = xp.where(visible, q[:, head] @ keys.T * scale, -math.inf)
        sink = None if sinks is None else sinks[head : head + 1][:, None]
        total = total + xp.sum(softmax(scores, xp, sink), axis=0)[positions - tokens :]
    return total / heads
