"""The forward pass on MLX: the layers of the reference, over the trunk in MLX's memory and experts in slots.

The host reads each layer's chosen experts, has the core's residency bring their records into memory, and goes on. A
token alone is computed by the device's kernels, all its experts in one pass; of several tokens, expert by expert. It
does what _core.Engine does, by the same calls.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from ... import _core
from ...devices.mlx import plain
from ...devices.mlx.experts import Array, Chosen, ExpertShape, LayerExperts, RecordKind, Router, padded
from ...devices.mlx.memory import SlotMemory
from ...devices.mlx.working import operations
from .. import reference
from ..bundle import Bundle
from ..layers.indexer import Choice
from ..pruning import PruneRule
from .memory import MOST_WIRED, kept_of
from .past import LayerPast
from .weights import TrunkWeights

NOTHING, LAST, ALL = 0, 1, 2  # rows of logits that a part wants
ASK_S = 0.05  # between two calls of stop()
TYPES = {"float16": mx.float16, "float32": mx.float32}
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

    pasts: list[LayerPast]
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


@dataclass
class Span:
    """The tokens of one sequence in a step."""

    timeline: Timeline
    ids: np.ndarray  # (tokens,)
    want: int
    x: Array | None = None  # (1, tokens, width)
    h: Array | None = None  # (tokens, dim): the input of a layer's experts
    chosen: np.ndarray | None = None  # (tokens, top_k), -1 for none
    weights: np.ndarray | None = None


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
    experts. slot_bytes: called when everything else has been allocated, returns the memory for experts. Raises
    DamagedFile, OSError and MemoryError like _core.Engine.
    """

    in_place = True

    def __init__(
        self,
        bundle: Bundle,
        sizes: Sizes,
        mask_routers: dict[str, list[np.ndarray]] | None = None,
        slot_bytes: Callable[[], int] | None = None,
    ):
        self.config, self.sizes, self.cap_bytes = bundle.config.planned(sizes.context), sizes, sizes.cap_bytes
        self._masks = mask_routers or {}
        mx.set_cache_limit(sizes.cache_bytes)
        self._stream = mx.new_thread_unsafe_stream(mx.default_device())
        with mx.stream(self._stream):
            self._weights = TrunkWeights(bundle)
            self._layers = self._layer_experts(bundle)
            self._routers = [self._router(layer) for layer in range(self.config.layer_count)]
            self._timelines = [self._new_timeline() for _ in range(sizes.sequences)]
        c = self.config
        self._shape = ExpertShape(c.dim, c.expert_hidden, c.activation, c.swiglu_alpha, c.swiglu_limit, c.swiglu_shift)
        with mx.stream(self._stream):
            kinds = next(its.kinds for its in self._layers if its)
            self._operations = operations(filter(None, self._routers), self._shape, kinds)
        experts = [c.experts_of(layer) for layer in range(c.layer_count)]
        self._first = np.concatenate([[0], np.cumsum(experts)]).astype(int)  # of each layer, the record of expert 0
        self._nbytes = [its.nbytes for its in bundle.experts.values()]
        self._memory = SlotMemory()
        _, records, frequency = bundle.record_table()
        self._residency = _core.Residency(
            [str(file) for file in bundle.files],
            records,
            frequency,
            slot_bytes() if slot_bytes else sizes.slot_bytes,
            sizes.readers,
            float(_core.HALF_LIFE_TOKENS * c.layer_count),
            experts=experts,
            memory=self._memory,
        )
        self._wire()
        self._snapshots: list[Snapshot] = []  # the least recently used first
        self._pinned: list[int] = []  # records that queued work may read
        self._queued: list[Array] = []
        self._stop: Callable[[], bool] | None = None
        self._asked = 0.0
        self._cleared = CacheCleared()

    def _new_timeline(self) -> Timeline:
        def past(layer: int) -> LayerPast:
            kept = kept_of(self.config.layers[layer].attention, self.sizes.context)
            return LayerPast(kept, TYPES[self.sizes.kv], self._weights.of_layer(layer))

        with mx.stream(self._stream):
            return Timeline([past(layer) for layer in range(self.config.layer_count)])

    def _layer_experts(self, bundle: Bundle) -> list[LayerExperts | None]:
        c = self.config
        kinds = [
            RecordKind(tuple(tuple(its) for its in one.encodings), one.parts, one.nbytes) for one in bundle.layouts
        ]
        numbers = mx.array(np.array([kind.numbers() for kind in kinds]))
        found: list[LayerExperts | None] = []
        for layer in range(c.layer_count):
            own = [bundle.experts[layer, expert].layout for expert in range(c.experts_of(layer))]
            kind_of = padded(mx, mx.array(own, mx.int32)) if own else None
            present = tuple(sorted(set(own)))
            found.append(LayerExperts(c.top_k_of(layer), kinds, numbers, kind_of, present) if own else None)
        return found

    def _router(self, layer: int) -> Router | None:
        c, rule = self.config, self.config.router
        if not c.has_experts(layer):
            return None

        def values(name: str, wanted: bool) -> Array | None:
            return self._weights.trunk(f"layers.{layer}.{name}") if wanted else None

        return Router(
            c.experts_of(layer),
            c.top_k_of(layer),
            rule.score,
            rule.renormalise,
            sum_eps=rule.sum_eps,
            scale=c.routing_scale,
            threshold=rule.threshold,
            groups=rule.groups,
            top_groups=rule.top_groups,
            top2sum=rule.group_score == "top2sum",
            bias=values("router_bias", rule.selection_bias and not c.is_hashed(layer)),
            group_of=mx.array(c.groups_of(layer), mx.int32) if rule.groups > 1 else None,
            expert_scale=values("expert_scale", rule.expert_scale),
        )

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
        self._check_cap()
        spans = self._planned(parts)
        self._stop, self._asked = stop, time.monotonic()
        with mx.stream(self._stream):
            try:
                logits = self._computed(spans)
            except BaseException:
                for span in spans:
                    for past in span.timeline.pasts:
                        past.abandon()
                raise
            finally:
                self._settle()
        for span in spans:
            for past in span.timeline.pasts:
                past.commit(len(span.ids))
            span.timeline.ids += span.ids.tolist()
            span.timeline.counters["tokens"] += len(span.ids)
        return logits

    def _planned(self, parts: Sequence[tuple]) -> list[Span]:
        spans, rows = [], 0
        for number, tokens, want in parts:
            timeline, ids = self._timelines[self._checked(number)], np.asarray(tokens, np.int32)
            if not len(ids):
                raise ValueError("a step takes 1 to chunk tokens")
            if timeline.position + len(ids) > self.sizes.context:
                raise ValueError("the context is full")
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
        wire(self._weights.nbytes + cached + self._residency.counters["bytes"])

    def _checked(self, sequence: int) -> int:
        if not 0 <= sequence < self.sizes.sequences:
            raise ValueError("there is no such sequence")
        return sequence

    def _computed(self, spans: list[Span]) -> np.ndarray:
        """The logits of the spans' tokens."""
        c, w = self.config, self._weights
        choices = [Choice() for _ in spans]
        for span in spans:
            span.x = reference.embed(c, w, span.ids[None], mx)
        for layer in range(c.layer_count):
            for span, choice in zip(spans, choices, strict=True):
                self._attended(layer, span, choice)
            if c.has_experts(layer):
                self._route(layer, spans)
                self._experts(layer, spans)
            elif c.layers[layer].mlp:
                for span in spans:
                    y = reference.dense_block(c, w, layer, reference.mlp_input(c, w, layer, span.x, mx), mx)
                    span.x = reference.with_mlp(c, w, layer, span.x, y, mx)
            else:
                for span in spans:
                    span.x = reference.scaled(c, w, layer, span.x, mx)
            self._queue([span.x for span in spans])
            self._check_wanted()
            self._residency.tick()
        rows = [span.x[:, {NOTHING: len(span.ids), LAST: -1, ALL: 0}[span.want] :] for span in spans]
        logits = [reference.head(c, w, x, mx)[0] for x in rows if x.shape[1]]
        mx.eval(logits, [past.arrays() for span in spans for past in span.timeline.pasts])
        return np.concatenate([np.zeros((0, c.vocab), np.float32), *map(np.array, logits)])

    def _attended(self, layer: int, span: Span, choice: Choice) -> None:
        """Everything of a layer before its MLP."""
        c, w, timeline = self.config, self._weights, span.timeline
        past = timeline.pasts[layer]
        if c.layers[layer].ngrams:
            ids = np.concatenate([np.array(timeline.ids, np.int64), span.ids])[None]
            span.x = reference.with_ngrams(c, w, layer, span.x, ids, mx, past)
        if c.layers[layer].attention:
            y = reference.attention_block(c, w, layer, span.x, mx, choice, past)
            span.x = reference.with_attention(c, w, layer, span.x, y, mx)

    def _route(self, layer: int, spans: list[Span]) -> None:
        """Choose the experts of each token, read them back, and prune them."""
        c, w = self.config, self._weights
        found = []
        for span in spans:
            span.h = reference.mlp_input(c, w, layer, span.x, mx)
            logits = reference.router_logits(c, w, layer, reference.router_input(c, w, layer, span.x, mx), mx)
            its, given = self._layers[layer], self._given(layer, span)
            chosen = self._operations.route(self._routers[layer], logits, its, its.kind_of, given)
            found.append([part[: len(span.ids) * its.top_k].reshape(-1, its.top_k) for part in chosen[:2]])
        mx.eval(found, [(span.h, span.x) for span in spans])
        self._queued = []
        self._release()  # the layer before has been computed
        for span, (ids, weights) in zip(spans, found, strict=True):
            span.chosen, span.weights = np.array(ids), np.array(weights)
            if span.timeline.rule.rule != "off":
                self._prune(layer, span)
            counters = span.timeline.counters
            counters["moe_tokens"] += len(span.ids)
            counters["experts_used"] += int((span.chosen >= 0).sum())
            if span.timeline.rule.rule != "off":
                routed = np.array(weights)
                every, kept = routed.sum(-1), np.where(span.chosen >= 0, routed, 0).sum(-1)
                left = np.divide(kept, every, out=np.ones_like(every), where=every > 0)  # a table may name no expert
                counters["dropped_weight"] += float((1 - left).sum())

    def _given(self, layer: int, span: Span) -> Array | None:
        """The experts that a table lists for each token, int32 (tokens, n), -1 for none; None: there is no table."""
        if not self.config.is_hashed(layer):
            return None
        return self._weights.rows_of(f"layers.{layer}.router_table", span.ids).astype(mx.int32)

    def _prune(self, layer: int, span: Span) -> None:
        rule, weights = span.timeline.rule, span.weights
        if rule.rule == "ratio":
            kept = reference.kept_by_ratio(weights, rule.threshold[layer])
        elif rule.rule == "share":
            kept = reference.kept_by_share(weights, rule.threshold[layer])
        else:
            router = self._masks[rule.rule][layer].reshape(self.config.top_k_of(layer), -1)
            shares = np.where(weights.sum(-1, keepdims=True) > 0, weights, 1)  # a table may name no expert
            kept = reference.kept_by_router(router, np.array(span.h), shares, rule.price, rule.rule == "loss")
        span.chosen, span.weights = reference.keep_first(self.config, span.chosen, weights, kept)

    # ---- experts

    def _experts(self, layer: int, spans: list[Span]) -> None:
        """Add the experts' outputs, and what follows them in the layer, to the spans' x."""
        c, w = self.config, self._weights
        many = [span for span in spans if len(span.ids) > 1]
        sums = dict(zip(map(id, many), self._by_expert(layer, many), strict=True)) if many else {}
        for span in spans:
            y = sums[id(span)] if id(span) in sums else self._of_token(layer, span)
            self._queue([y])
            if c.sums_experts:
                y = reference.with_shared(c, w, layer, span.x, y, mx)
                y = reference.post_norm(c, w, f"layers.{layer}.mlp_post_norm", y, mx)
                span.x = reference.with_mlp(c, w, layer, span.x, y, mx)
            else:
                span.x = reference.with_shared(c, w, layer, span.x, y, mx).reshape(span.x.shape)

    def _residual(self, span: Span) -> Array:
        """What the experts' outputs are added to, (tokens, dim)."""
        return mx.zeros_like(span.h) if self.config.sums_experts else span.x.reshape(span.h.shape)

    def _of_token(self, layer: int, span: Span) -> Array:
        """The residual stream of one token with the sum of its experts, (1, dim), in order of rank.

        If not all of them fit in memory at once, some of the first ranks are added at a time, which is the same sum.
        """
        ids, y = span.chosen[0], self._residual(span)
        ranks = [rank for rank, expert in enumerate(ids.tolist()) if expert >= 0]
        records = {rank: int(self._first[layer] + ids[rank]) for rank in ranks}
        taken = self._take(span, [(records[rank], 1) for rank in ranks])
        if len(taken) == len(ranks):
            return self._ranks_added(layer, span, ranks, y)
        self._settle()
        left = list(ranks)
        while left:
            now: list[int] = []
            while left and self._take(span, [(records[left[0]], 1)], wait=not now):
                now.append(left.pop(0))
            y = self._ranks_added(layer, span, now, y)
            mx.eval(y)
            self._release()
        return y

    def _ranks_added(self, layer: int, span: Span, ranks: list[int], y: Array) -> Array:
        """y with the outputs of the experts of these ranks, whose records are pinned."""
        its = self._layers[layer]
        ids = np.full(len(span.chosen[0]), -1, np.int32)
        ids[ranks] = span.chosen[0][ranks]
        offsets = self._residency.offsets(int(self._first[layer]), self.config.experts_of(layer))
        pages = np.where(ids >= 0, offsets[ids] // _core.SMALL_ALIGNMENT, -1).astype(np.int32)
        kinds = np.array(its.kind_of)[np.maximum(ids, 0)]
        flat = (padded(mx, mx.array(values), fill) for values, fill in ((ids, -1), (span.weights[0], 0), (pages, -1)))
        chosen = Chosen(*flat, padded(mx, mx.array(kinds)))
        its = replace(its, present=tuple(sorted(set(kinds[ranks].tolist()))))
        return self._operations.experts(self._shape, its, self._memory.arena, span.h, chosen, y)

    def _by_expert(self, layer: int, spans: list[Span]) -> list[Array]:
        """_of_token() of many tokens, (tokens, dim) of each span: each expert computes its own rows of all spans."""
        c, its, arena = self.config, self._layers[layer], self._memory.arena
        users = [[np.nonzero(span.chosen == expert) for expert in range(c.experts_of(layer))] for span in spans]
        uses = [sum(len(own[expert][0]) for own in users) for expert in range(c.experts_of(layer))]
        left = {int(self._first[layer] + expert): expert for expert, count in enumerate(uses) if count}
        outputs: list[list[tuple[np.ndarray, Array]]] = [[] for _ in spans]  # places, their outputs
        while left:
            taken = self._take(spans[0], [(record, uses[expert]) for record, expert in left.items()])
            offsets = self._residency.offsets(int(self._first[layer]), c.experts_of(layer))
            computed = []
            for record, _ in taken:
                expert = left.pop(record)
                kind = its.kinds[int(its.kind_of[expert])]
                words = plain.record_at(arena, int(offsets[expert]) // _core.SMALL_ALIGNMENT, kind)
                for span, own, found in zip(spans, users, outputs, strict=True):
                    tokens, places = own[expert]
                    if len(tokens):
                        out = plain.expert(self._shape, kind, words, span.h[mx.array(tokens)][None])[0]
                        found.append((tokens * its.top_k + places, out))
                        computed.append(out)
            mx.eval(computed)
            self._release()
        return [self._summed(span, found) for span, found in zip(spans, outputs, strict=True)]

    def _summed(self, span: Span, outputs: list[tuple[np.ndarray, Array]]) -> Array:
        """The residual stream of some tokens with the weighted sums of their places' outputs, in order of rank."""
        (tokens, top_k), y = span.chosen.shape, self._residual(span)
        if not outputs:
            return y
        row_of = np.zeros(tokens * top_k, np.int32)
        row_of[np.concatenate([places for places, _ in outputs])] = np.arange(sum(len(its) for its, _ in outputs))
        of_places = mx.concatenate([out for _, out in outputs])[mx.array(row_of)].reshape(tokens, top_k, -1)
        weights, there = mx.array(span.weights)[:, :, None], mx.array(span.chosen >= 0)[:, :, None]
        for rank in range(top_k):
            y = mx.where(there[:, rank], y + weights[:, rank] * of_places[:, rank], y)
        return y

    # ---- records

    def _take(self, span: Span, records: list[tuple[int, int]], wait: bool = True) -> list[tuple[int, bool]]:
        """Pin records, (record, uses), as many as there is memory for, and count them for a span's sequence.

        wait: if what is pinned leaves no memory, give it up when the work that reads it is done.
        """
        taken = self._residency.take(records, self._stop)
        if not taken and records and wait:
            self._settle()
            taken = self._residency.take(records, self._stop)
        counters = span.timeline.counters
        for record, hit in taken:
            counters["expert_hits" if hit else "expert_misses"] += 1
            counters["bytes_read"] += 0 if hit else self._nbytes[record]
        self._pinned += [record for record, _ in taken]
        return taken

    def _queue(self, arrays: list[Array]) -> None:
        self._queued += arrays
        mx.async_eval(arrays)

    def _settle(self) -> None:
        """Wait for queued work, and let go of the records that it read."""
        mx.eval(self._queued)
        self._queued = []
        self._release()

    def _release(self) -> None:
        for record in self._pinned:
            self._residency.release(record)
        self._pinned = []

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
        if protect:
            raise ValueError("device mlx has no rule that protects tokens of a prompt; choose another rule or device")
        if rule in ("otp", "loss") and rule not in self._masks:
            raise ValueError("pruning by mask routers needs a bundle that has them")
        if rule in ("ratio", "share") and len(threshold) != self.config.layer_count:
            raise ValueError("pruning needs one threshold a layer")
        self._timelines[self._checked(sequence)].rule = PruneRule(rule, tuple(threshold), price)

    @property
    def position(self) -> int:
        return self._timelines[0].position

    def restorable(self, positions: int, sequence: int = 0) -> int:
        """How many of the first `positions` positions truncate() would leave."""
        return self._origin(self._checked(sequence), positions)[0]

    def _origin(self, sequence: int, positions: int) -> tuple[int, list[dict[str, Array]]]:
        """The longest prefix of at most so many positions that a sequence can go back to, and the states there."""
        timeline, layers = self._timelines[sequence], self.config.layer_count
        if not 0 <= positions <= timeline.position:
            raise ValueError("there are not as many positions")
        if not any(past.states for past in timeline.pasts):
            return positions, [{}] * layers
        if positions == timeline.position:
            return positions, [past.states for past in timeline.pasts]
        kept = [its for its in self._snapshots if its.sequence == sequence and its.position <= positions]
        latest = max(kept, key=lambda its: its.position, default=None)
        if latest is None:
            return 0, [{}] * layers
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
        if not self.sizes.snapshots or not any(states):
            return
        others = [its for its in self._snapshots if (its.sequence, its.position) != (sequence, timeline.position)]
        self._snapshots = [*others, Snapshot(sequence, timeline.position, states)][-self.sizes.snapshots :]

    def copy_positions(self, from_: int, to: int, positions: int) -> None:
        """Copy the first positions of a sequence, which restorable() has returned, to another one."""
        if self._checked(from_) == self._checked(to):
            raise ValueError("a sequence is not copied to itself")
        found, states = self._origin(from_, positions)
        if found != positions:
            raise ValueError("the state of that position is not there any more; take a snapshot there")
        source, target = self._timelines[from_], self._timelines[to]
        with mx.stream(self._stream):
            for past, other, own in zip(target.pasts, source.pasts, states, strict=True):
                past.copy(other, positions, own)
            mx.eval([past.arrays() for past in target.pasts])
        target.ids = source.ids[:positions]
        self._snapshots = [its for its in self._snapshots if its.sequence != to]

    def resize_slots(self, nbytes: int) -> None:
        """Resize the memory for experts, between two steps. Results do not depend on it."""
        with mx.stream(self._stream):
            self._settle()
            self._residency.resize(nbytes)
            self._wire()

    # ---- what is said about it

    @property
    def kernels(self) -> str:
        return self._operations.name

    @property
    def slot_bytes(self) -> int:
        """The memory for experts."""
        return self._residency.counters["bytes"]

    @property
    def direct(self) -> bool:
        return self._residency.direct

    def sequence_counters(self, sequence: int) -> dict:
        """The `counters` of one sequence; records read ahead count for none."""
        return dict(self._timelines[self._checked(sequence)].counters)

    @property
    def counters(self) -> dict:
        """Totals since construction; see _core.Engine."""
        its = self._residency.counters
        own = {name: sum(one.counters[name] for one in self._timelines) for name in COUNTED[:4]}
        return {
            "records_held": its["records_held"],
            "uncounted_bytes": 0,
            "expert_hits": its["hits"],
            "expert_misses": its["misses"],
            "bytes_read": its["bytes_read"],
            "read_ahead": its["read_ahead"],
            "read_ahead_used": its["read_ahead_used"],
            **own,
        }

    def set_prefetch(self, on: bool) -> None:
        """Nothing is read ahead yet."""

    @property
    def worths(self) -> np.ndarray:
        return self._residency.worths

    def inject(self, kind: str, record: int = -1, after: int = 0, times: int = -1, value: int = 0) -> None:
        """For tests: see _core.Engine."""
        self._residency.inject(kind, record, after, times, value)

    def clear_faults(self) -> None:
        self._residency.clear_faults()

    @property
    def faults_met(self) -> int:
        return self._residency.faults_met
