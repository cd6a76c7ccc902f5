"""What a layer knows of the tokens before those that it computes.

Layers are written for a whole sequence, where there are none. A Past with a memory lets them go on from any position;
the forward pass of a device that is written in Python gives them one for each sequence and layer.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .arrays import array


class Past:
    """No tokens before: a sequence from its beginning, of which nothing is kept.

    name tells apart what one layer keeps. x: (sequences, tokens, ...), of the tokens that are computed.
    """

    position = 0  # of the first token that is computed
    # By name, a matrix of the layer: given where memory for the keys and values of all positions and heads is spared.
    matrix: Callable[[str], Any] | None = None
    is_received = False  # whether the layer sets `received`, the attention that each token receives; see received()
    received: Any = None

    def all(self, _name: str, x, before: int | None = None):
        """x of all tokens, those before included, (sequences, position + tokens, ...).

        before: how many rows there are before x, if that is not one a token; x may then be None, for no more rows. None
        if there are no rows at all.
        """
        return x

    def latest(self, _name: str, x, count: int, xp=np):
        """x after that of the `count` tokens before, with zeros where there are not as many."""
        before = xp.zeros((len(x), count, *x.shape[2:]), dtype=x.dtype)
        return xp.concatenate([before, x], axis=1)

    def state(self, shape: tuple[int, ...], xp=np):
        """The recurrent state before the tokens that are computed, zeros at the beginning."""
        return array(np.zeros(shape, np.float32), xp)

    def keep_state(self, state) -> None:
        """Set the recurrent state after the tokens that are computed."""


NO_PAST = Past()
