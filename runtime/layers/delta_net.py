"""Gated delta net (arXiv 2412.06464): linear attention, which has a state of fixed size in place of keys and values.

The state of a head, (head_dim, value_dim), maps keys to values. A token first lets it decay, then replaces, in part,
the value of its own key by its own value, and reads the value of its query.
"""

from dataclasses import dataclass

import numpy as np

from .arrays import l2_norm, rms_norm, sigmoid, silu, softplus
from .indexer import Choice
from .past import NO_PAST, Past

KEY_EPS = 1e-6  # added to the squared norms of queries and keys
GATES = {"silu": silu, "sigmoid": sigmoid}


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """The parameters of one layer's gated delta net; sizes are in elements."""

    heads: int  # of values, each with a state
    kv_heads: int  # of queries and keys; each is shared by heads / kv_heads consecutive heads
    head_dim: int  # of queries and keys
    value_dim: int
    conv_kernel: int  # of the convolution over q, k and v: how many tokens an output depends on, its own included
    gate: str = "silu"  # silu | sigmoid, of the output

    output = "delta.o"  # the output projection
    recurrence = "delta_net"
    rope = None
    output_bias = False

    @property
    def channels(self) -> int:
        """The values per token that the convolution passes over: all queries, then all keys, then all values."""
        return 2 * self.kv_heads * self.head_dim + self.heads * self.value_dim

    def planned(self, _context: int) -> "DeltaNet":
        """The same for any length of context."""
        return self

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors of this layer by canonical name, for a residual stream of `dim`, in the order of use."""
        outputs = self.heads * self.value_dim
        return {
            "delta.qkv": (self.channels, dim),
            "delta.gate": (outputs, dim),
            "delta.write": (self.heads, dim),
            "delta.decay": (self.heads, dim),
            "delta.conv": (self.conv_kernel, self.channels),
            "delta.decay_bias": (self.heads,),
            "delta.decay_rate": (self.heads,),
            "delta.norm": (self.value_dim,),
            "delta.o": (dim, outputs),
        }

    def stages(self) -> list[tuple[str, ...]]:
        """The matrices that may be rounded in the order of use, those with the same input together."""
        return [("delta.qkv", "delta.gate"), ("delta.o",)]

    def pass_values(self, rows: int, tokens: int) -> int:
        """About how many values attended() holds at once for `rows` rows in sequences of `tokens`."""
        states = -(-rows // tokens) * self.heads * self.head_dim * self.value_dim
        return rows * 6 * (self.channels + self.heads * self.value_dim) + 3 * states

    def attended(self, trunk, times, h, eps: float, xp=np, choice: Choice | None = None, past: Past = NO_PAST):
        """Compute the input of the output projection, (sequences, tokens, heads * value_dim).

        h: (sequences, tokens, dim). trunk(name) is a tensor of the layer, times(name, x) the product of x with a matrix
        of the layer.
        """
        sequences, tokens, _ = h.shape
        keys = self.kv_heads * self.head_dim

        # q k v, through the convolution
        x = silu(convolve(times("delta.qkv", h), trunk("delta.conv"), xp, past=past), xp)
        q, k, v = x[..., :keys], x[..., keys : 2 * keys], x[..., 2 * keys :]
        q, k = (part.reshape(sequences, tokens, self.kv_heads, self.head_dim) for part in (q, k))
        v = v.reshape(sequences, tokens, self.heads, self.value_dim)
        q, k = l2_norm(q, KEY_EPS, xp) * self.head_dim**-0.5, l2_norm(k, KEY_EPS, xp)

        # how much of the state a token replaces, and how much is left of it before
        write = sigmoid(times("delta.write", h), xp)
        decay = xp.exp(-trunk("delta.decay_rate") * softplus(times("delta.decay", h) + trunk("delta.decay_bias"), xp))

        # the state's values, normed and gated
        y = delta_rule(q, k, v, write, decay, xp, past)
        y = rms_norm(y, trunk("delta.norm"), eps, xp).reshape(sequences, tokens, -1)
        return y * GATES[self.gate](times("delta.gate", h), xp)


def convolve(x, weights, xp=np, apart: int = 1, past: Past = NO_PAST, name: str = "conv"):
    """Causal convolution of each channel: x (sequences, tokens, channels), weights (kernel, channels), the last one for
    a token's own value. apart: how many tokens the inputs of an output are apart."""
    kernel, tokens = len(weights), x.shape[1]
    padded = past.latest(name, x, (kernel - 1) * apart, xp)
    return sum(padded[:, at * apart : at * apart + tokens] * weights[at] for at in range(kernel))


def delta_rule(q, k, v, write, decay, xp=np, past: Past = NO_PAST):
    """Read each token's value from the state, (sequences, tokens, heads, value_dim).

    q, k: (sequences, tokens, kv_heads, head_dim); v: (sequences, tokens, heads, value_dim); write and decay:
    (sequences, tokens, heads).
    """
    sequences, tokens, heads, value_dim = v.shape
    shared = heads // k.shape[2]
    state = past.state((sequences, heads, k.shape[3], value_dim), xp)
    read = []
    for t in range(tokens):
        key, query = (xp.repeat(part[:, t], shared, axis=1)[:, :, None] for part in (k, q))
        state = state * decay[:, t, :, None, None]
        change = (v[:, t, :, None] - key @ state) * write[:, t, :, None, None]
        state = state + key.swapaxes(2, 3) * change
        read.append((query @ state)[:, :, 0])
    past.keep_state(state)
    return xp.stack(read, axis=1)
