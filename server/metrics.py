"""Counters of a server, and /metrics: Prometheus' text format."""

import time
from collections import Counter
from typing import TYPE_CHECKING

from .. import _core
from ..runtime.answer import Generation

if TYPE_CHECKING:
    from .service import Service

WINDOW_S = 10.0  # over which tokens a second are counted


class Metrics:
    def __init__(self, service: "Service") -> None:
        self.service = service
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens = self.prompt_tokens = self.cached_tokens = self.answers = 0
        self.experts_used = self.dropped_weight = 0.0  # means of the last answer
        self._rates: list[list[float]] = []  # [second, tokens] of the last ones

    def count(self, path: str, status: int) -> None:
        self.requests[path, status] += 1

    def step(self, pieces: list) -> None:
        """Count a step's pieces."""
        generated = 0
        for _, piece in pieces:
            if not isinstance(piece, Generation):
                continue
            generated += len(piece.tokens)
            if piece.finish_reason is not None:
                self.answers += 1
                self.prompt_tokens += piece.prompt_tokens
                self.cached_tokens += piece.cached_tokens
                self.experts_used, self.dropped_weight = piece.experts_used, piece.dropped_routing_weight
        self.tokens += generated
        second = int(time.monotonic())
        if generated and self._rates and self._rates[-1][0] == second:
            self._rates[-1][1] += generated
        elif generated:
            self._rates = [*self._rates[-int(WINDOW_S) :], [second, generated]]

    def rate(self) -> float:
        """Tokens a second, of all answers."""
        since = int(time.monotonic()) - WINDOW_S
        return sum(tokens for second, tokens in list(self._rates) if second >= since) / WINDOW_S

    def text(self) -> str:
        service, stats, plan = self.service, self.service.runtime.stats, self.service.runtime.plan
        scheduler = service.scheduler
        rows: list[tuple[str, str, str, float]] = [
            ("ram_bytes", "gauge", "The cap.", stats["ram_bytes"]),
            ("peak_memory_bytes", "gauge", "The peak of the process's memory.", stats["peak_memory_bytes"]),
            ("memory_bytes", "gauge", "The process's memory now.", _core.resident_bytes() + stats["uncounted_bytes"]),
            ("experts_memory_bytes", "gauge", "Memory for experts.", plan.experts_bytes),
            ("expert_hits_total", "counter", "Uses of experts in memory.", stats["expert_hits"]),
            ("expert_misses_total", "counter", "Uses of experts that were read.", stats["expert_misses"]),
            ("read_bytes_total", "counter", "Bytes of experts read.", stats["bytes_read"]),
            ("experts_used", "gauge", "Experts a token used in a layer, in the last answer.", self.experts_used),
            ("dropped_routing_weight", "gauge", "Share left out by pruning, in the last answer.", self.dropped_weight),
            ("sequences", "gauge", "Answers that are computed at once at most.", plan.sequences),
            ("answers_running", "gauge", "Answers that are computed.", len(scheduler.running)),
            ("answers_waiting", "gauge", "Answers that wait for a sequence.", scheduler.waiting),
            ("answers_total", "counter", "Answers that ended.", self.answers),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("cached_tokens_total", "counter", "Tokens of prompts that were in a KV cache.", self.cached_tokens),
            ("generated_tokens_total", "counter", "Tokens of answers.", self.tokens),
            ("generated_tokens_per_second", "gauge", f"Over the last {WINDOW_S:g} seconds.", round(self.rate(), 3)),
            ("start_time_seconds", "gauge", "When the server started.", service.started),
        ]
        lines = []
        for name, kind, about, value in rows:
            lines += [
                f"# HELP edge_moe_{name} {about}",
                f"# TYPE edge_moe_{name} {kind}",
                f"edge_moe_{name} {value:.10g}",
            ]
        lines += [
            "# HELP edge_moe_requests_total Requests by path and status.",
            "# TYPE edge_moe_requests_total counter",
        ]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'edge_moe_requests_total{{path="{path}",status="{status}"}} {count}')
        return "\n".join([*lines, ""])
