"""Steps of any tokens, layer by layer: the experts that a layer needs are known before it goes on.

Of a span of several tokens each expert computes its own, while it is in memory; of one token all experts are computed
together. Sums are in order of rank, so they do not depend on what is in memory when.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ...devices.mlx.experts import Array
from .forward import Forward
from .records import Records, Use
from .spans import Span, State

CheckWanted = Callable[[], None]  # raises Interrupted


def count(span: Span, state: State) -> np.ndarray:
    """The chosen experts of a span, (tokens, top_k), which are counted for its sequence. Waits for them."""
    ids, counters = np.array(state.ids), span.timeline.counters
    counters["moe_tokens"] += len(span.ids)
    counters["experts_used"] += int((ids >= 0).sum())
    if state.dropped is not None:
        counters["dropped_weight"] += float(np.array(state.dropped).astype(np.float64).sum())
    return ids


def uses_of(spans: list[Span], chosen: list[np.ndarray]) -> list[Use]:
    """The experts that some spans have chosen, in order of number."""
    found: dict[int, Use] = {}
    for span, ids in zip(spans, chosen, strict=True):
        for expert, uses in zip(*np.unique(ids[ids >= 0], return_counts=True), strict=True):
            before = found.get(int(expert), Use(int(expert), 0, span.timeline))
            found[int(expert)] = before._replace(uses=before.uses + int(uses))
    return [found[expert] for expert in sorted(found)]


class ByLayer:
    """The forward pass of such steps."""

    def __init__(self, forward: Forward, records: Records):
        self._forward, self._records = forward, records

    def results(self, spans: list[Span], check_wanted: CheckWanted) -> list:
        """Forward.results(), to be evaluated."""
        its, states = self._forward, self._forward.entered(spans)
        for layer in its.layers:
            states = [its.attended(layer, span, state) for span, state in zip(spans, states, strict=True)]
            if its.config.has_experts(layer):
                states = self._with_experts(layer, spans, states)
            else:
                states = [its.without_experts(layer, state) for state in states]
            mx.async_eval([state.arrays for state in states])
            check_wanted()
            self._records.residency.tick()
        return its.results(spans, states)

    def _with_experts(self, layer: int, spans: list[Span], states: list[State]) -> list[State]:
        its = self._forward
        states = [its.routed(layer, span, state) for span, state in zip(spans, states, strict=True)]
        mx.eval([state.arrays for state in states])
        chosen = [count(span, state) for span, state in zip(spans, states, strict=True)]
        sums = self.sums(layer, spans, states, chosen)
        return [its.with_experts(layer, state, y) for state, y in zip(states, sums, strict=True)]

    def sums(self, layer: int, spans: list[Span], states: list[State], chosen: list[np.ndarray]) -> list[Array]:
        """What Forward.experts() returns for each span, evaluated. chosen: their experts, on the host."""
        many = [at for at, span in enumerate(spans) if len(span.ids) > 1]
        of_many = self._by_expert(layer, *([its[at] for at in many] for its in (spans, states, chosen)))
        found = dict(zip(many, of_many, strict=True))
        for at, span in enumerate(spans):
            if at not in found:
                found[at] = self._of_token(layer, span, states[at], chosen[at])
        return [found[at] for at in range(len(spans))]

    def _of_token(self, layer: int, span: Span, state: State, chosen: np.ndarray) -> Array:
        """The sum of one token's experts. If not all fit in memory at once, some of the first ranks are added at a
        time."""
        left, y = [int(expert) for expert in chosen[0] if expert >= 0], None
        uses = {expert: Use(expert, 1, span.timeline) for expert in left}
        now = self._records.take(layer, [uses[expert] for expert in sorted(left)])
        if len(now) < len(left):
            self._records.release()
            now = []
        while y is None or left:
            while len(now) < len(left) and self._records.take(layer, [uses[left[len(now)]]]):
                now.append(left[len(now)])
            ids = mx.array(np.where(np.isin(chosen, now), chosen, -1))
            y = self._added(layer, state._replace(ids=ids), y)
            mx.eval(y)
            self._records.release()
            left, now = left[len(now) :], []
        return y

    def _added(self, layer: int, state: State, y: Array | None) -> Array:
        """y, or the residual stream, with the outputs of the state's experts, which are pinned."""
        pages = mx.array(self._records.pages(layer))
        return self._forward.experts(layer, state, self._records.arena, pages, y)

    def _by_expert(self, layer: int, spans: list[Span], states: list[State], chosen: list[np.ndarray]) -> list[Array]:
        """The sums of many tokens: each expert computes its own rows of all spans."""
        left = {use.expert: use for use in uses_of(spans, chosen)}
        outputs: list[list[tuple[np.ndarray, Array]]] = [[] for _ in spans]  # places, their outputs
        while left:
            taken = self._records.take(layer, list(left.values()))
            pages, computed = self._records.pages(layer), []
            for expert in taken:
                del left[expert]
                for state, ids, found in zip(states, chosen, outputs, strict=True):
                    tokens, places = np.nonzero(ids == expert)
                    if len(tokens):
                        h = state.h[mx.array(tokens)]
                        out = self._forward.expert(layer, expert, self._records.arena, int(pages[expert]), h)
                        found.append((tokens * ids.shape[1] + places, out))
                        computed.append(out)
            mx.eval(computed)
            self._records.release()
        return [self._summed(*its) for its in zip(states, chosen, outputs, strict=True)]

    def _summed(self, state: State, chosen: np.ndarray, outputs: list[tuple[np.ndarray, Array]]) -> Array:
        """The residual stream of some tokens with the weighted sums of their places' outputs, in order of rank."""
        (tokens, top_k), y = chosen.shape, self._forward.residual(state)
        if not outputs:
            return y
        row_of = np.zeros(tokens * top_k, np.int32)
        row_of[np.concatenate([places for places, _ in outputs])] = np.arange(sum(len(its) for its, _ in outputs))
        of_places = mx.concatenate([out for _, out in outputs])[mx.array(row_of)].reshape(tokens, top_k, -1)
        weights, there = state.weights[:, :, None], mx.array(chosen >= 0)[:, :, None]
        for rank in range(top_k):
            y = mx.where(there[:, rank], y + weights[:, rank] * of_places[:, rank], y)
        return y
