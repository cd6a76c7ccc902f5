"""The forward pass on MLX: the layers of the reference, over the trunk in MLX's memory and experts in slots.

It does what _core.Engine does, by the same calls. Steps of single tokens are computed in units that run ahead of the
host, others layer by layer. With a part of a bundle it runs the part's layers, in a Pipeline of several ranks.
"""

import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ... import _core
from ...devices.mlx.experts import Array
from ..bundle import Bundle
from ..pruning import PruneRule
from .by_layer import ByLayer
from .forward import Forward
from .memory import MOST_WIRED, VALUE_BYTES, cached_values, kept_of, state_values
from .past import LOADED, LayerPast
from .pipeline import Pipeline
from .ranks import Ranks
from .records import Records
from .spans import ALL, COUNTED, LAST, NOTHING, Sizes, Snapshot, Span, Timeline
from .units import Units

ASK_S = 0.05  # between two calls of stop()
SAVED_PIECE = 1 << 20  # bytes that are written or read at once
NO_STATE = "the state of that position is not there any more; take a snapshot there"
TYPES = {"float16": mx.float16, "float32": mx.float32}


class CacheCleared:
    """Gives back the memory that MLX keeps; the last part of an engine to go, which has freed it by then."""

    def __del__(self) -> None:
        mx.clear_cache()
        wire(0)


def wire(nbytes: int) -> None:
    """Keep so much of what is allocated in memory, on a Mac that has room for it."""
    if mx.metal.is_available():
        mx.set_wired_limit(nbytes if nbytes < MOST_WIRED * mx.device_info()["memory_size"] else 0)


def most_slot_bytes() -> int:
    """The maximum size of the memory for experts, which is one of Metal's buffers."""
    return mx.device_info().get("max_buffer_length", 1 << 62)


class MlxEngine:
    """The forward pass over a bundle.

    mask_routers: by rule ("otp", "loss"), by layer, float32 (top_k * (dim + 2 top_k + 1),), empty for a layer without
    experts. slot_bytes: called when everything else has been allocated, returns the memory for experts. ranks: those
    that run the parts of a bundle, of which this is one. Raises DamagedFile, OSError and MemoryError like _core.Engine.
    """

    in_place = True

    def __init__(
        self,
        bundle: Bundle,
        sizes: Sizes,
        mask_routers: dict[str, list[np.ndarray]] | None = None,
        slot_bytes: Callable[[], int] | None = None,
        ranks: Ranks | None = None,
    ):
        self.config, self.sizes, self.cap_bytes = bundle.config.planned(sizes.context), sizes, sizes.cap_bytes
        self._layers, self._pipeline = bundle.layers, Pipeline(ranks, bundle.part) if ranks and bundle.part else None
        self._keeps_states = any(state_values(self.config, layer) for layer in range(self.config.layer_count))
        mx.set_cache_limit(sizes.cache_bytes)
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        self._masks = frozenset(mask_routers or ())
        with mx.stream(self._stream):
            self._forward = Forward(bundle, self.config, mask_routers or {})
            self._timelines = [self._new_timeline() for _ in range(sizes.sequences)]
            self._forward.choose_kernels()
            self._records = Records(bundle, slot_bytes() if slot_bytes else sizes.slot_bytes, sizes.readers)
        self._by_layer = ByLayer(self._forward, self._records)
        self._units = Units(self._forward, self._records, self._by_layer)
        self._gate, self._may_prefetch = _core.PrefetchGate(), True
        self._wire()
        self._snapshots: list[Snapshot] = []  # the least recently used first
        self._stop: Callable[[], bool] | None = None
        self._asked = 0.0
        self._cleared = CacheCleared()

    def _new_timeline(self) -> Timeline:
        def past(layer: int) -> LayerPast:
            kept = kept_of(self.config.layers[layer].attention, self.sizes.context)
            return LayerPast(kept, TYPES[self.sizes.kv], self._forward.weights.of_layer(layer))

        return Timeline([past(layer) for layer in self._layers])

    # ---- a step

    def forward(self, tokens, want: int, stop: Callable[[], bool] | None = None, sequence: int = 0) -> np.ndarray:
        """step() for one sequence."""
        return self.step([(sequence, tokens, want)], stop)

    def step(self, parts: Sequence[tuple], stop: Callable[[], bool] | None = None) -> np.ndarray:
        """Run tokens (at most `chunk` together) of some sequences at their next positions.

        parts: (sequence, token ids, want), one of each sequence; want 0: no logits, 1: the last row, 2: all rows.
        Returns float32 (rows, vocab), part by part; no part's bits depend on the others. stop() is called about twenty
        times a second; if it returns true, raises Interrupted. On an error no position changes.
        """
        spans: list[Span] = []
        self._stop = self._records.stop = stop if self._layers.start == 0 else None  # else another rank asks
        self._asked = time.monotonic()

        def compute() -> np.ndarray:
            self._check_cap()
            spans.extend(self._planned(parts))
            with mx.stream(self._stream):
                try:
                    return self._computed(spans)
                except BaseException:
                    mx.synchronize(self._stream)
                    self._records.release()
                    raise

        try:
            found = self._pipeline.step(parts, compute, stop, self._totals) if self._pipeline else compute()
        except BaseException:
            for past in (past for span in spans for past in span.timeline.pasts):
                past.abandon()
            raise
        for span in spans:
            for past in span.timeline.pasts:
                past.commit(len(span.ids))
            span.timeline.ids += span.ids.tolist()
            span.timeline.counters["tokens"] += len(span.ids)
        return found

    def _computed(self, spans: list[Span]) -> np.ndarray:
        """The logits of the spans' tokens, none where other ranks have the last layers."""
        self._forward.entering = self._pipeline.enter(spans) if self._pipeline else None
        results = self._results(spans)
        pasts = [past for span in spans for past in span.timeline.pasts]
        mx.eval(results, [past.arrays() for past in pasts])
        if any(past.overflows() for past in pasts):
            raise _core.KvOverflow("a key or value is beyond what a KV cache in float16 holds")
        if self._pipeline and not self._pipeline.is_last:
            self._pipeline.leave(results)
            results = []
        return np.concatenate([np.zeros((0, self.config.vocab), np.float32), *map(np.array, results)])

    def _results(self, spans: list[Span]) -> list[Array]:
        if any(len(span.ids) > 1 for span in spans):
            return self._by_layer.results(spans, self._check_wanted)
        ahead = False
        if self._may_prefetch and len(spans) == 1 and not self._records.holds_all():
            its = self._records.residency.counters
            ahead = self._gate.open(its["read_ahead"], its["read_ahead_used"])
        return self._units.results(spans, self._check_wanted, ahead)

    def _planned(self, parts: Sequence[tuple]) -> list[Span]:
        spans, rows = [], 0
        for number, tokens, want in parts:
            timeline, ids = self._timelines[self._checked(number)], np.ascontiguousarray(tokens, np.int32)
            if not len(ids):
                raise ValueError("a step takes 1 to chunk tokens")
            if timeline.position + len(ids) > self.sizes.context:
                raise ValueError("the context is full")
            if len(parts) > 1 and len(ids) > 1 and timeline.rule.protect > 0:
                raise ValueError("a prompt whose tokens are protected from pruning is computed in a step of its own")
            if any(span.timeline is timeline for span in spans):
                raise ValueError("a sequence takes part in a step once")
            if ((ids < 0) | (ids >= self.config.vocab)).any():
                raise ValueError("token id out of range")
            spans.append(Span(timeline, ids, want))
            rows += {NOTHING: 0, LAST: 1, ALL: len(ids)}[want]
        if not 1 <= sum(len(span.ids) for span in spans) <= self.sizes.chunk:
            raise ValueError("a step takes 1 to chunk tokens")
        if rows > self.sizes.logits_rows:
            raise ValueError("more rows of logits wanted than were planned for")
        return spans

    def _check_cap(self) -> None:
        """Nothing but this limits a process on a Mac: its driver takes memory that no plan knows of."""
        if self.cap_bytes and (peak := _core.peak_bytes()) > self.cap_bytes:
            raise MemoryError(
                f"this process has had {peak / 1e6:,.0f} MB, above its cap of {self.cap_bytes / 1e6:,.0f} MB; load the "
                "bundle again with a lower context, or raise the cap"
            )

    def _wire(self) -> None:
        cached = sum(its.nbytes for one in self._timelines for past in one.pasts for its in past.cached)
        wire(self._forward.weights.nbytes + cached + self._records.residency.counters["bytes"])

    def _checked(self, sequence: int) -> int:
        if not 0 <= sequence < self.sizes.sequences:
            raise ValueError("there is no such sequence")
        return sequence

    def _check_wanted(self) -> None:
        if self._stop is None or time.monotonic() < self._asked + ASK_S:
            return
        self._asked = time.monotonic()
        if self._stop():
            raise _core.Interrupted("interrupted")

    # ---- sequences

    def set_prune(
        self, rule: str, threshold: Sequence[float] = (), price: float = 0.0, protect: float = 0.0, sequence: int = 0
    ) -> None:
        """Set the rule by which a sequence's tokens keep experts from now on; see _core.Engine."""
        if protect and not self.config.tells_received:
            raise ValueError(
                "this rule protects tokens by the attention they receive, which only attention with keys in every "
                "layer tells; choose another rule or calibrate the bundle again"
            )
        if rule in ("otp", "loss") and rule not in self._masks:
            raise ValueError("pruning by mask routers needs a bundle that has them")
        if rule in ("ratio", "share") and len(threshold) != self.config.layer_count:
            raise ValueError("pruning needs one threshold a layer")
        self._timelines[self._checked(sequence)].rule = PruneRule(rule, tuple(threshold), price, protect)

    @property
    def position(self) -> int:
        return self._timelines[0].position

    def restorable(self, positions: int, sequence: int = 0) -> int:
        """How many of the first `positions` positions truncate() would leave."""
        return self._origin(self._checked(sequence), positions)[0]

    def _origin(self, sequence: int, positions: int) -> tuple[int, list[dict[str, Array]]]:
        """The longest prefix of at most so many positions that a sequence can go back to, and the states there."""
        timeline = self._timelines[sequence]
        if not 0 <= positions <= timeline.position:
            raise ValueError("there are not as many positions")
        if not self._keeps_states:
            return positions, [{} for _ in timeline.pasts]
        if positions == timeline.position:
            return positions, [past.states for past in timeline.pasts]
        kept = [its for its in self._snapshots if its.sequence == sequence and its.position <= positions]
        latest = max(kept, key=lambda its: its.position, default=None)
        if latest is None:
            return 0, [{} for _ in timeline.pasts]
        self._snapshots.remove(latest)
        self._snapshots.append(latest)
        return latest.position, latest.states

    def truncate(self, positions: int, sequence: int = 0) -> int:
        """Truncate a sequence to its first positions, or to as many as its state can be restored to."""
        left, states = self._origin(self._checked(sequence), positions)
        timeline = self._timelines[sequence]
        for past, own in zip(timeline.pasts, states, strict=True):
            past.restore(left, own)
        del timeline.ids[left:]
        self._snapshots = [its for its in self._snapshots if its.sequence != sequence or its.position <= left]
        return left

    def snapshot(self, sequence: int = 0) -> None:
        """Keep the recurrent state of a sequence at its position; the least recently used make room."""
        timeline = self._timelines[self._checked(sequence)]
        states = [past.states for past in timeline.pasts]
        if not self.sizes.snapshots or not self._keeps_states:
            return
        others = [its for its in self._snapshots if (its.sequence, its.position) != (sequence, timeline.position)]
        self._snapshots = [*others, Snapshot(sequence, timeline.position, states)][-self.sizes.snapshots :]

    def copy_positions(self, from_: int, to: int, positions: int) -> None:
        """Copy the first positions of a sequence, which restorable() has returned, to another one."""
        if self._checked(from_) == self._checked(to):
            raise ValueError("a sequence is not copied to itself")
        found, states = self._origin(from_, positions)
        if found != positions:
            raise ValueError(NO_STATE)
        source, target = self._timelines[from_], self._timelines[to]
        with mx.stream(self._stream):
            for past, other, own in zip(target.pasts, source.pasts, states, strict=True):
                past.copy(other, positions, own)
            mx.eval([past.arrays() for past in target.pasts])
        target.ids = source.ids[:positions]
        self._snapshots = [its for its in self._snapshots if its.sequence != to]

    def saved_bytes(self, positions: int) -> int:
        """How many bytes save_positions() writes."""
        c, one = self.config, VALUE_BYTES[self.sizes.kv]
        cached = sum(cached_values(c.layers[layer].attention, positions) for layer in self._layers)
        states = sum(state_values(c, layer) for layer in self._layers) if positions else 0
        return one * cached + 4 * states

    def save_positions(self, positions: int, write: Callable[[np.ndarray], None], sequence: int = 0) -> None:
        """Call write(uint8 (n,)) for what a sequence knows of its first positions; see _core.Engine."""
        found, states = self._origin(self._checked(sequence), positions)
        if found != positions:
            raise ValueError(NO_STATE)
        with mx.stream(self._stream):
            for layer, past, own in zip(self._layers, self._timelines[sequence].pasts, states, strict=True):
                kept = kept_of(self.config.layers[layer].attention, positions)
                for array in (*(past.rows(name, shape[0]) for name, shape in kept.items()), *own.values()):
                    values = np.array(array).reshape(-1).view(np.uint8)
                    for at in range(0, len(values), SAVED_PIECE):
                        write(values[at : at + SAVED_PIECE])

    def load_positions(self, ids, read: Callable[[np.ndarray], None], sequence: int = 0) -> None:
        """Let a sequence know what save_positions() wrote of the tokens `ids`; see _core.Engine."""
        if len(ids) > self.sizes.context:
            raise ValueError("there are more ids than the context has positions")
        self.truncate(0, self._checked(sequence))

        def values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            found = np.empty(shape, dtype)
            raw = found.reshape(-1).view(np.uint8)
            for at in range(0, len(raw), SAVED_PIECE):
                read(raw[at : at + SAVED_PIECE])
            return found

        timeline, states = self._timelines[sequence], []
        with mx.stream(self._stream):
            for layer, past in zip(self._layers, timeline.pasts, strict=True):
                for name, shape in kept_of(self.config.layers[layer].attention, len(ids)).items():
                    past.set_rows(name, values((1, *shape), self.sizes.kv))
                count = state_values(self.config, layer) if len(ids) else 0
                states.append({LOADED: mx.array(values((count,), "float32"))} if count else {})
            mx.eval(states, [past.arrays() for past in timeline.pasts])
        for past, own in zip(timeline.pasts, states, strict=True):
            past.restore(len(ids), own)
        timeline.ids[:] = np.asarray(ids).tolist()

    def resize_slots(self, nbytes: int) -> None:
        """Resize the memory for experts, between two steps. Results do not depend on it."""
        with mx.stream(self._stream):
            self._records.residency.resize(nbytes)
            self._wire()

    # ---- what is said about it

    @property
    def kernels(self) -> str:
        return self._forward.operations.name

    @property
    def slot_bytes(self) -> int:
        """The memory for experts."""
        return self._records.residency.counters["bytes"]

    @property
    def direct(self) -> bool:
        return self._records.residency.direct

    def sequence_counters(self, sequence: int) -> dict:
        """The `counters` of one sequence; records read ahead count for none."""
        return dict(self._timelines[self._checked(sequence)].counters)

    @property
    def counters(self) -> dict:
        """Totals since construction, of all ranks; see _core.Engine, and Units."""
        others = self._pipeline.others if self._pipeline else {}
        totals = {name: count + others.get(name, 0) for name, count in self._totals().items()}
        of_sequences = {name: sum(one.counters[name] for one in self._timelines) for name in COUNTED[:4]}
        return {"uncounted_bytes": 0, **totals, **of_sequences}

    def _totals(self) -> dict:
        """What has been counted here."""
        its = self._records.residency.counters
        return {
            "records_held": its["records_held"],
            "expert_hits": its["hits"],
            "expert_misses": its["misses"],
            "bytes_read": its["bytes_read"],
            "read_ahead": its["read_ahead"],
            "read_ahead_used": its["read_ahead_used"],
            "units": self._units.units,
            "replays": self._units.replays,
            "read_backs": self._units.read_backs,
        }

    def set_prefetch(self, on: bool) -> None:
        """Read ahead, where that pays, or never."""
        self._may_prefetch = on

    def set_window(self, units: int) -> None:
        """Set how many units are queued beyond the one that the host confirms; see Units. Results do not depend on
        it."""
        self._units.window = units

    @property
    def worths(self) -> np.ndarray:
        return self._records.residency.worths

    def inject(self, kind: str, record: int = -1, after: int = 0, times: int = -1, value: int = 0) -> None:
        """For tests: see _core.Engine."""
        self._records.residency.inject(kind, record, after, times, value)

    def clear_faults(self) -> None:
        self._records.residency.clear_faults()

    @property
    def faults_met(self) -> int:
        return self._records.residency.faults_met
