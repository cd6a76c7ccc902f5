"""What the layers of one sequence know of the tokens before, in MLX's memory."""

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ...devices.mlx.experts import Array
from ..layers.past import Past
from .weights import Matrix

LOADED = ""  # the states that have not been asked for since they were loaded, one after another, in the order of use


class LayerPast(Past):
    """The past of one layer: of every position what its attention caches, and of its recurrences the latest state.

    The former is written in place at the positions that are computed, so a step that failed leaves nothing that a later
    one does not overwrite. The latter is kept when a step has succeeded.

    kept: the shapes of what the attention caches, by name. matrix: by name, a matrix of the layer.
    """

    def __init__(self, kept: dict[str, tuple[int, ...]], dtype: mx.Dtype, matrix: Callable[[str], Matrix]):
        self.position, self.matrix = 0, matrix
        self._cached = {name: mx.zeros((1, *shape), dtype) for name, shape in kept.items()}
        mx.eval(self._cached)
        self._written: dict[str, slice] = {}  # rows, by a step
        self.states: dict[str, Array] = {}  # of the tokens before `position`
        self._next: dict[str, Array] = {}

    def all(self, name: str, x: Array | None, before: int | None = None) -> Array | None:
        first = self.position if before is None else before
        end = first if x is None else first + x.shape[1]
        if x is not None:
            self._cached[name][:, first:end] = x.astype(self._cached[name].dtype)
            self._written[name] = slice(first, end)
        return self._cached[name][:, :end].astype(mx.float32) if end else None

    @property
    def cached(self) -> list[Array]:
        return list(self._cached.values())

    def latest(self, name: str, x: Array, count: int, xp=mx) -> Array:
        before = self._state(name, (1, count, *x.shape[2:]))
        whole = mx.concatenate([before, x], axis=1)
        self._next[name] = whole[:, whole.shape[1] - count :]
        return whole

    def state(self, shape: tuple[int, ...], xp=mx) -> Array:
        return self._state("state", shape)

    def _state(self, name: str, shape: tuple[int, ...]) -> Array:
        if name not in self.states and LOADED in self.states:
            size, whole = math.prod(shape), self.states[LOADED]
            rest = {LOADED: whole[size:]} if whole.size > size else {}
            own = {its: state for its, state in self.states.items() if its != LOADED}
            self.states = {**own, name: whole[:size].reshape(shape), **rest}
        state = self.states.get(name)
        return mx.zeros(shape) if state is None else state

    def keep_state(self, state: Array) -> None:
        self._next["state"] = state

    def arrays(self) -> list[Array]:
        """All that a step has written or will keep."""
        return [*self.cached, *self._next.values()]

    def overflows(self) -> bool:
        """Whether a step, which has been computed, has written what the cache's type cannot hold."""
        halves = ((self._cached[name], rows) for name, rows in self._written.items())
        written = (np.array(its, copy=False)[:, rows] for its, rows in halves if its.dtype == mx.float16)
        return any(np.isinf(rows).any() for rows in written)

    def commit(self, tokens: int) -> None:
        """So many tokens have been computed."""
        self.position += tokens
        self.states = {**self.states, **self._next}
        self._next, self._written = {}, {}

    def abandon(self) -> None:
        """A step has failed."""
        self._next, self._written = {}, {}

    def rows(self, name: str, count: int) -> Array:
        """The first rows of what is cached by a name."""
        return self._cached[name][:, :count]

    def set_rows(self, name: str, rows: np.ndarray) -> None:
        """Set the first rows of what is cached by a name."""
        self._cached[name][:, : rows.shape[1]] = mx.array(rows)

    def restore(self, position: int, states: dict[str, Array]) -> None:
        """Go back to a position, at which the recurrent states were these."""
        self.position, self.states, self._next = position, states, {}

    def copy(self, other: "LayerPast", position: int, states: dict[str, Array]) -> None:
        """Take the first positions of another sequence's."""
        for name, cached in other._cached.items():
            self._cached[name][:, :position] = cached[:, :position]
        self.restore(position, states)
