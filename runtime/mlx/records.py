"""The records of experts in memory, for the layers of a step."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ... import _core
from ...devices.mlx.experts import PADDED
from ...devices.mlx.memory import SlotMemory
from ..bundle import Bundle
from .spans import Timeline


class Use(NamedTuple):
    """One expert of a layer in a step."""

    expert: int
    uses: int  # by how many tokens
    timeline: Timeline  # of the first of them, for which it is counted


class Records:
    """The records of a bundle: the core's residency, with the slots in MLX's memory."""

    def __init__(self, bundle: Bundle, slot_bytes: int, readers: int):
        c = bundle.config
        self._memory = SlotMemory()
        self._nbytes = [its.nbytes for its in bundle.experts.values()]
        experts = [c.experts_of(layer) if layer in bundle.layers else 0 for layer in range(c.layer_count)]
        self._first = np.concatenate([[0], np.cumsum(experts)]).tolist()  # of each layer, the record of expert 0
        _, records, frequency = bundle.record_table()
        self.residency = _core.Residency(
            [str(file) for file in bundle.files],
            records,
            frequency,
            slot_bytes,
            readers,
            float(_core.HALF_LIFE_TOKENS * len(bundle.layers)),
            experts=experts,
            memory=self._memory,
        )
        self._pinned: list[int] = []
        self.stop: Callable[[], bool] | None = None  # of the present step

    @property
    def arena(self):
        return self._memory.arena

    def pages(self, layer: int) -> np.ndarray:
        """Where the records of a layer begin, int32 (experts, padded), -1 for one that is not in memory."""
        first, end = self._first[layer : layer + 2]
        found = np.full(max(end - first, PADDED), -1, np.int32)
        found[: end - first] = self.residency.offsets(first, end - first) // _core.SMALL_ALIGNMENT
        return found

    def holds_all(self) -> bool:
        return self.residency.counters["records_held"] == len(self._nbytes) and bool((self.residency.table >= 0).all())

    def take(self, layer: int, uses: Sequence[Use], begun: Callable[[], None] | None = None) -> list[int]:
        """Pin experts of a layer, as many as there is memory for, and count them; see Residency.take()."""
        first, by_expert = self._first[layer], {use.expert: use for use in uses}
        taken = self.residency.take([(first + use.expert, use.uses) for use in uses], self.stop, begun)
        for record, hit in taken:
            counters = by_expert[record - first].timeline.counters
            counters["expert_hits" if hit else "expert_misses"] += 1
            counters["bytes_read"] += 0 if hit else self._nbytes[record]
        self._pinned += [record for record, _ in taken]
        return [record - first for record, _ in taken]

    def release(self) -> None:
        """Let go of all that is pinned."""
        for record in self._pinned:
            self.residency.release(record)
        self._pinned = []

    def protect(self, first: int, end: int) -> None:
        """Let no read ahead evict records of the layers from `first` up to `end`."""
        self.residency.protect(self._first[first], self._first[end] - self._first[first])

    def read_ahead(self, experts: Iterable[tuple[int, int]]) -> None:
        """Replace the list of experts (layer, expert) that may be needed soon, the most likely first."""
        wanted = dict.fromkeys(self._first[layer] + expert for layer, expert in experts)
        self.residency.read_ahead(np.array(list(wanted), np.int32))
