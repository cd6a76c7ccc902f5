"""The layers of one rank within a step of a model that runs on several: what it gets, sends on, and counts.

Between ranks go the residual streams of a step's tokens in float32, with the bits that one process would go on with,
the positions that an indexer has chosen for layers after it, and what the ranks have counted in the step so far.
"""

import json
import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ... import _core
from ...devices.mlx.experts import Array
from ..bundle_part import Part
from .ranks import Message, Ranks
from .spans import Span, State

Counts = dict[str, float]
Stop = Callable[[], bool]


class Pipeline:
    """The steps of one rank, which has a part of a bundle."""

    def __init__(self, ranks: Ranks, part: Part):
        self.is_last = part.is_last
        self._ranks, self._is_first = ranks, part.is_first
        self._before = self._after = Message()  # of the rank before, and for the next one, in this step
        self._spans: list[Span] = []
        self._counted: list[Counts] = []  # before this step, by the spans' sequences
        self.others: Counts = {}  # what the engines of the other ranks have counted

    def step(
        self, parts: Sequence[tuple], compute: Callable[[], np.ndarray], stop: Stop | None, totals: Callable[[], Counts]
    ) -> np.ndarray:
        """Run a step, of parts as for MlxEngine.step(), on all ranks, and return its logits on all of them.

        compute: calls enter() and leave() and returns the logits, of which all but the last rank have none. stop counts
        on the first rank. totals: what this rank's engine has counted.
        """
        own: Counts = {}

        def passed(before: Message | None) -> Message:
            if self._is_first and stop and stop():
                raise _core.Interrupted("interrupted")
            self._before, first = before or Message(), totals()
            logits = compute()
            own.update(_sum(totals(), first, -1))
            if self.is_last:
                self._after = Message({"shape": logits.shape}, logits.tobytes())
            counts = [
                _sum(span.timeline.counters, its, -1) for span, its in zip(self._spans, self._counted, strict=True)
            ]
            so_far = self._before.told.get("counts", [{}] * (1 + len(counts)))
            counts = [_sum(its, more) for its, more in zip([own, *counts], so_far, strict=True)]
            return Message({**self._after.told, "counts": counts}, self._after.data)

        about = [(number, np.asarray(ids).tolist(), want) for number, ids, want in parts]
        message = self._ranks.run(json.dumps(about).encode(), passed)
        total, *counts = message.told["counts"]
        self.others = _sum(self.others, _sum(total, own, -1))
        for span, before, its in zip(self._spans, self._counted, counts, strict=True):
            span.timeline.counters.update(_sum(before, its))
        return np.frombuffer(bytearray(message.data), np.float32).reshape(message.told["shape"])

    def enter(self, spans: list[Span]) -> list[State] | None:
        """What the rank before has made of the spans; None on the first rank."""
        self._spans, self._counted = spans, [dict(span.timeline.counters) for span in spans]
        if self._is_first:
            return None
        data, states = memoryview(self._before.data), []
        for shape, seen in self._before.told["spans"]:
            nbytes = 4 * math.prod(shape)
            x, data = mx.array(np.frombuffer(data[:nbytes], np.float32).reshape(shape)), data[nbytes:]
            visible = None
            if seen is not None:
                nbytes = -(-math.prod(seen) // 8)
                bits = np.unpackbits(np.frombuffer(data[:nbytes], np.uint8), count=math.prod(seen))
                visible, data = mx.array(bits.astype(bool).reshape(seen)), data[nbytes:]
            states.append(State(x, visible))
        return states

    def leave(self, states: list[list[Array]]) -> None:
        """Give the next rank what this one has made of the spans, and the choices."""
        shapes, data = [], []
        for x, *visible in states:
            seen = np.array(visible[0]) if visible else None
            shapes.append((x.shape, None if seen is None else seen.shape))
            data += [np.array(x).tobytes(), b"" if seen is None else np.packbits(seen).tobytes()]
        self._after = Message({"spans": shapes}, b"".join(data))


def _sum(one: Counts, other: Counts, sign: int = 1) -> Counts:
    return {key: one.get(key, 0) + sign * other.get(key, 0) for key in {**one, **other}}
