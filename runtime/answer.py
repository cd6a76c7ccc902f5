"""An answer and its statistics: the text, the speed, and the resources of one call."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .sampling import TokenLogprobs
from .turns import PATIENCE_S

if TYPE_CHECKING:
    from .runtime import Runtime


PEAK_S = 0.1  # between queries of the process's peak memory


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and its statistics. From stream(), `text` and `tokens` are of one piece, and counts are so far."""

    text: str
    tokens: list[int]
    finish_reason: str | None  # "stop" | "length" | "cancelled"; None while the answer is not complete
    prompt_tokens: int
    cached_tokens: int  # tokens of the prompt that were in the KV cache already
    generation_tokens: int
    prompt_tps: float  # tokens a second, without cached tokens
    generation_tps: float
    time_to_first_token: float  # seconds from the first step on, including waiting for other calls
    ram_bytes: int  # the cap
    peak_memory_bytes: int  # of the process, as the system counts it
    expert_hits: int
    expert_misses: int
    bytes_read: int
    experts_used: float  # mean per token and layer
    top_k: int  # of the checkpoint: a bundle may use fewer in some layers
    dropped_routing_weight: float  # mean share of routing weight that pruning left out
    device: str
    logprobs: list[TokenLogprobs] | None = None  # of each of `tokens`, if asked for


def whole_of(pieces: Iterable[Generation]) -> Generation:
    """Join all pieces of an answer."""
    texts: list[str] = []
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for piece in pieces:
        texts.append(piece.text)
        tokens += piece.tokens
        logprobs += piece.logprobs or []
    return replace(piece, text="".join(texts), tokens=tokens, logprobs=logprobs or None)


class Account:
    """The statistics of one call: the changes of the engine's counters and the clock during its own turns."""

    def __init__(self, runtime: "Runtime", prompt_tokens: int):
        self.runtime, self.prompt_tokens = runtime, prompt_tokens
        self.count = 0  # generated tokens
        self.cached_tokens, self.time_to_first_token, self._asked = 0, 0.0, time.perf_counter()
        self.prompt_tps = 0.0
        self._used: dict[str, float] = {}  # in earlier turns
        self._before: dict[str, float] | None = None  # counters at the start of this turn; None outside of a turn
        self._sequence: int | None = None
        self._seconds = self._prefill_seconds = self._began = 0.0
        self._ahead_until = 0.0
        self._peak, self._peak_until = 0, 0.0

    @contextmanager
    def turn(self, sequence: int | None = None) -> Iterator[None]:
        """Count steps that are computed for this call alone or, with `sequence`, for several sequences together."""
        # No reference to the engine is kept: an exception's traceback would keep its memory alive after close().
        self._sequence = sequence
        self._before, self._began = self._counters(), time.perf_counter()
        try:
            yield
        finally:
            if self.runtime.is_open:
                self._used = self._used_by(self._counters())
            self._seconds = self._computed_seconds()
            self._before = None

    def prefilled(self, tokens: int) -> None:
        """Record that `tokens` of the prompt were computed and the others were cached."""
        self._prefill_seconds = self._computed_seconds()
        self.prompt_tps = tokens / max(self._prefill_seconds, 1e-9)
        self.cached_tokens = self.prompt_tokens - tokens
        self.time_to_first_token = time.perf_counter() - self._asked

    def recomputed(self, seconds: float) -> None:
        """Record the seconds of recomputing what another call evicted from the KV cache."""
        self._ahead_until = time.perf_counter() + seconds + PATIENCE_S

    def runs_ahead(self) -> bool:
        """Whether to compute ahead of requests: for as long as recomputing evicted tokens took.

        So at least half of the time is spent on new tokens, however often two streams evict each other's KV cache.
        Several ranks, whose clocks differ, do not run ahead.
        """
        return self.runtime.ranks is None and time.perf_counter() < self._ahead_until

    def piece(self, text: str, tokens: list[int], finish_reason: str | None) -> Generation:
        runtime = self.runtime
        counters = self._counters()
        used = self._used_by(counters)
        moe_tokens = max(used.get("moe_tokens", 0), 1)
        seconds = max(self._computed_seconds() - self._prefill_seconds, 1e-9)
        return Generation(
            text=text,
            tokens=tokens,
            finish_reason=finish_reason,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generation_tokens=self.count,
            prompt_tps=self.prompt_tps,
            generation_tps=(self.count - 1) / seconds if self.count > 1 else 0.0,  # the first belongs to the prompt
            time_to_first_token=self.time_to_first_token,
            ram_bytes=runtime.plan.ram_bytes,
            peak_memory_bytes=self._peak_bytes(counters, finish_reason is not None),
            expert_hits=int(used.get("expert_hits", 0)),
            expert_misses=int(used.get("expert_misses", 0)),
            bytes_read=int(used.get("bytes_read", 0)),
            experts_used=used.get("experts_used", 0) / moe_tokens,
            top_k=runtime.config.top_k,
            dropped_routing_weight=used.get("dropped_weight", 0.0) / moe_tokens,
            device=runtime.device,
        )

    def _peak_bytes(self, counters: dict[str, float], last: bool) -> int:
        """The peak memory, queried ten times a second and at the end: it takes 36 us, which count in a small model."""
        if last or time.perf_counter() >= self._peak_until:
            self._peak, self._peak_until = self.runtime._peak_bytes(counters), time.perf_counter() + PEAK_S
        return self._peak

    def _used_by(self, counters: dict[str, float]) -> dict[str, float]:
        if self._before is None:
            return self._used
        return {key: self._used.get(key, 0) + counters[key] - self._before[key] for key in counters}

    def _counters(self) -> dict[str, float]:
        engine = self.runtime._open()
        if self._sequence is None:
            return engine.counters
        return {**engine.sequence_counters(self._sequence), "uncounted_bytes": engine.counters["uncounted_bytes"]}

    def _computed_seconds(self) -> float:
        return self._seconds + (0.0 if self._before is None else time.perf_counter() - self._began)
