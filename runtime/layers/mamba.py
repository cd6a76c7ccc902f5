"""Mamba-2 (arXiv 2405.21060): a state space layer, which has a state of fixed size in place of keys and values.

The state of a head, (head_dim, value_dim), maps keys to values. A token first lets it decay, then adds its own value,
times a time step, at its key, and reads the value of its query. The paper calls keys B, queries C and values x.
"""

from dataclasses import dataclass

import numpy as np

from .arrays import array, rms_norm, silu, softplus
from .delta_net import convolve
from .indexer import Choice
from .past import NO_PAST, Past


@dataclass(frozen=True, slots=True)
class Mamba:
    """The parameters of one layer of Mamba-2; sizes are in elements."""

    heads: int  # of values, each with a state
    kv_heads: int  # of queries and keys, with a norm each; each is shared by heads / kv_heads consecutive heads
    head_dim: int  # of queries and keys
    value_dim: int
    conv_kernel: int  # of the convolution over values, keys and queries: how many tokens an output depends on
    conv_bias: bool
    least_step: float  # the minimum of a time step

    output = "mamba.o"  # the output projection
    recurrence = "mamba"
    rope = None
    output_bias = False

    @property
    def channels(self) -> int:
        """The values per token that the convolution passes over: all values, then all keys, then all queries."""
        return self.heads * self.value_dim + 2 * self.kv_heads * self.head_dim

    def planned(self, _context: int) -> "Mamba":
        """The same for any length of context."""
        return self

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors of this layer by canonical name, for a residual stream of `dim`, in the order of use."""
        outputs = self.heads * self.value_dim
        return {
            "mamba.xbc": (self.channels, dim),
            "mamba.gate": (outputs, dim),
            "mamba.step": (self.heads, dim),
            "mamba.conv": (self.conv_kernel, self.channels),
            **({"mamba.conv_bias": (self.channels,)} if self.conv_bias else {}),
            "mamba.step_bias": (self.heads,),
            "mamba.decay_rate": (self.heads,),
            "mamba.skip": (self.heads,),
            "mamba.norm": (outputs,),
            "mamba.o": (dim, outputs),
        }

    def stages(self) -> list[tuple[str, ...]]:
        """The matrices that may be rounded in the order of use, those with the same input together."""
        return [("mamba.xbc", "mamba.gate"), ("mamba.o",)]

    def pass_values(self, rows: int, tokens: int) -> int:
        """About how many values attended() holds at once for `rows` rows in sequences of `tokens`."""
        states = -(-rows // tokens) * self.heads * self.head_dim * self.value_dim
        return rows * 6 * (self.channels + self.heads * self.value_dim) + 3 * states

    def attended(self, trunk, times, h, eps: float, xp=np, choice: Choice | None = None, past: Past = NO_PAST):
        """Compute the input of the output projection, (sequences, tokens, heads * value_dim).

        h: (sequences, tokens, dim); trunk, times: see DeltaNet.attended().
        """
        sequences, tokens, _ = h.shape
        values, keys = self.heads * self.value_dim, self.kv_heads * self.head_dim

        # v k q, through the convolution
        x = convolve(times("mamba.xbc", h), trunk("mamba.conv"), xp, past=past)
        x = silu(x + trunk("mamba.conv_bias") if self.conv_bias else x, xp)
        v = x[..., :values].reshape(sequences, tokens, self.heads, self.value_dim)
        k, q = (
            x[..., at : at + keys].reshape(sequences, tokens, self.kv_heads, self.head_dim)
            for at in (values, values + keys)
        )

        # the time step, and how much of the state is left
        step = softplus(times("mamba.step", h) + trunk("mamba.step_bias"), xp)
        step = xp.maximum(step, array(np.float32(self.least_step), xp))
        decay = xp.exp(-trunk("mamba.decay_rate") * step)

        # the state's values and the token's own, gated and normed
        y = scan(q, k, v, step, decay, xp, past) + v * trunk("mamba.skip")[:, None]
        y = y.reshape(sequences, tokens, -1) * silu(times("mamba.gate", h), xp)
        of_keys = (sequences, tokens, self.kv_heads, values // self.kv_heads)
        y = rms_norm(y.reshape(of_keys), np.ones(of_keys[-1], np.float32), eps, xp)
        return y.reshape(sequences, tokens, -1) * trunk("mamba.norm")


def scan(q, k, v, step, decay, xp=np, past: Past = NO_PAST):
    """Read each token's value from the state, (sequences, tokens, heads, value_dim); shapes as for delta_rule()."""
    sequences, tokens, heads, value_dim = v.shape
    shared = heads // k.shape[2]
    state = past.state((sequences, heads, k.shape[3], value_dim), xp)
    read = []
    for t in range(tokens):
        key, query = (xp.repeat(part[:, t], shared, axis=1)[:, :, None] for part in (k, q))
        added = v[:, t, :, None] * step[:, t, :, None, None]
        state = state * decay[:, t, :, None, None] + key.swapaxes(2, 3) * added
        read.append((query @ state)[:, :, 0])
    past.keep_state(state)
    return xp.stack(read, axis=1)
