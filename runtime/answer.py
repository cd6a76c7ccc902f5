"""An answer and its account: what one call computed, how fast, and what it took."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .sampling import TokenLogprobs
from .turns import PATIENCE_S

if TYPE_CHECKING:
    from .runtime import Runtime


PEAK_S = 0.1  # between two looks at the process's peak


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer and its account. From stream(): `text` is one piece, `tokens` its tokens, counts are so far."""

    text: str
    tokens: list[int]
    finish_reason: str | None  # "stop" | "length" | "cancelled"; None while more is to come
    prompt_tokens: int
    cached_tokens: int  # of the prompt, that the KV cache still held
    generation_tokens: int
    prompt_tps: float  # tokens a second; of those that were not still in the KV cache
    generation_tps: float
    time_to_first_token: float  # seconds from the first step on, waiting for other calls included
    ram_bytes: int  # the cap
    peak_memory_bytes: int  # of the process, as the system counts it
    expert_hits: int
    expert_misses: int
    bytes_read: int
    experts_used: float  # mean per token and layer
    top_k: int  # of the checkpoint: a bundle may use fewer in some layers
    dropped_routing_weight: float  # mean share of routing weight that pruning left out
    device: str
    logprobs: list[TokenLogprobs] | None = None  # of each of `tokens`, where they were asked for


def whole_of(pieces: Iterable[Generation]) -> Generation:
    """All pieces of an answer as one."""
    texts: list[str] = []
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for piece in pieces:
        texts.append(piece.text)
        tokens += piece.tokens
        logprobs += piece.logprobs or []
    return replace(piece, text="".join(texts), tokens=tokens, logprobs=logprobs or None)


class Account:
    """The statistics of one call: what the engine's counters and the clock moved by during its own turns."""

    def __init__(self, runtime: "Runtime", prompt_tokens: int):
        self.runtime, self.prompt_tokens = runtime, prompt_tokens
        self.count = 0  # of tokens generated
        self.cached_tokens, self.time_to_first_token, self._asked = 0, 0.0, time.perf_counter()
        self.prompt_tps = 0.0
        self._used: dict[str, float] = {}  # in turns before this one
        self._before: dict[str, float] | None = None  # counters when this turn began; None: it is not our turn
        self._sequence: int | None = None
        self._seconds = self._prefill_seconds = self._began = 0.0
        self._ahead_until = 0.0
        self._peak, self._peak_until = 0, 0.0

    @contextmanager
    def turn(self, sequence: int | None = None) -> Iterator[None]:
        """Steps that are computed for this call alone, or, among others, for this sequence."""
        # The engine is never kept here: an exception's traceback would keep its memory after close().
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
        """The prompt was computed, but for what the KV cache had of it."""
        self._prefill_seconds = self._computed_seconds()
        self.prompt_tps = tokens / max(self._prefill_seconds, 1e-9)
        self.cached_tokens = self.prompt_tokens - tokens
        self.time_to_first_token = time.perf_counter() - self._asked

    def recomputed(self, seconds: float) -> None:
        """What another call took out of the KV cache was computed again, which took so long."""
        self._ahead_until = time.perf_counter() + seconds + PATIENCE_S

    def runs_ahead(self) -> bool:
        """Whether to go on without being asked: for as long as it took to compute again what others took away.

        So at least half of the time is spent on new tokens, however often two streams take the KV cache in turns.
        """
        return time.perf_counter() < self._ahead_until

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
            generation_tps=(self.count - 1) / seconds if self.count > 1 else 0.0,  # the first came with the prompt
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
        """The peak, asked for ten times a second and at the end: 36 us, which are some of a small model's token."""
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
