"""Sequences, and the tokens of them that a step computes."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...devices.mlx.experts import Array
from ..pruning import PruneRule
from .past import LayerPast

NOTHING, LAST, ALL = 0, 1, 2  # rows of logits that a span wants
COUNTED = ("tokens", "experts_used", "moe_tokens", "dropped_weight", "expert_hits", "expert_misses", "bytes_read")


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a run."""

    context: int
    chunk: int
    logits_rows: int = 1
    kv: str = "float16"
    sequences: int = 1
    snapshots: int = 0
    slot_bytes: int = 0
    readers: int = 4
    cache_bytes: int = 1 << 24  # of memory that MLX has freed and keeps
    cap_bytes: int = 0  # of the process; 0: it is not watched


@dataclass
class Timeline:
    """One sequence."""

    pasts: list[LayerPast]  # of the layers that are computed here
    ids: list[int] = field(default_factory=list)
    rule: PruneRule = PruneRule()
    counters: dict = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))

    @property
    def position(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The recurrent states of a sequence at a position, by layer."""

    sequence: int
    position: int
    states: list[dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one sequence in a step."""

    timeline: Timeline
    ids: np.ndarray  # (tokens,)
    want: int

    @property
    def is_protected(self) -> bool:
        """Whether some of its tokens keep all experts, whatever the rule says."""
        return self.timeline.rule.protect > 0 and len(self.ids) > 1

    @property
    def first_row(self) -> int:
        """The first token whose logits are wanted."""
        return {NOTHING: len(self.ids), LAST: len(self.ids) - 1, ALL: 0}[self.want]


class State(NamedTuple):
    """What a span's tokens have become between two layers, and in one that has experts what it needs of them."""

    x: Array  # (1, tokens, width)
    visible: Array | None = None  # see Choice
    h: Array | None = None  # (tokens, dim): the input of the experts
    ids: Array | None = None  # int32 (tokens, top_k): the chosen experts, -1 for none
    weights: Array | None = None
    dropped: Array | None = None  # (tokens,): the share of routing weight that pruning left out

    @property
    def arrays(self) -> list[Array]:
        return [its for its in self if its is not None]
