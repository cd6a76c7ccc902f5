"""Gated short convolution: each channel depends on its own last few inputs, which take the place of keys and values."""

from dataclasses import dataclass

import numpy as np

from .delta_net import convolve
from .indexer import Choice
from .past import NO_PAST, Past


@dataclass(frozen=True, slots=True)
class ShortConv:
    """The parameters of one layer's gated short convolution; sizes are in elements."""

    value_dim: int  # channels
    conv_kernel: int  # how many tokens an output depends on, its own included

    # To the engine it is one head of values without queries and keys.
    heads, kv_heads, head_dim = 1, 1, 0
    output = "conv.o"  # the output projection
    recurrence = "short_conv"
    rope = None
    output_bias = False

    def planned(self, _context: int) -> "ShortConv":
        """The same for any length of context."""
        return self

    def shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The tensors of this layer by canonical name, for a residual stream of `dim`, in the order of use."""
        channels = self.value_dim
        projections = {f"conv.{part}": (channels, dim) for part in ("in", "write", "gate")}
        return {**projections, "conv.weights": (self.conv_kernel, channels), "conv.o": (dim, channels)}

    def stages(self) -> list[tuple[str, ...]]:
        """The matrices that may be rounded in the order of use, those with the same input together."""
        return [("conv.in", "conv.write", "conv.gate"), ("conv.o",)]

    def pass_values(self, rows: int, _tokens: int) -> int:
        """About how many values attended() holds at once for `rows` rows."""
        return rows * 6 * self.value_dim

    def attended(self, trunk, times, h, _eps: float, xp=np, choice: Choice | None = None, past: Past = NO_PAST):
        """Compute the input of the output projection, (sequences, tokens, channels); see DeltaNet.attended()."""
        x = times("conv.in", h) * times("conv.write", h)
        return convolve(x, trunk("conv.weights"), xp, past=past) * times("conv.gate", h)
