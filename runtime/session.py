"""Steps of the engine for the calls of a Runtime: whose tokens come next, what is computed already, what went wrong.

A call has a sequence of the engine while it goes on, and finds there what an earlier call left, as far as its prompt
begins alike. A step may have tokens of several calls: what each gets does not depend on the others.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from .. import _core
from .answer import Generation
from .plan import Plan
from .pruning import PruneRule
from .request import Request
from .sequences import Sequence, Sequences
from .turns import Turns

if TYPE_CHECKING:
    from .runtime import Runtime

NOTHING, LAST, ALL = 0, 1, 2  # rows of logits a step returns
Progress = Callable[[str, int, int], None]  # a step's name, how much of it is done, and of how much


class Session:
    """Of a Runtime, which it does not keep alive."""

    def __init__(self, runtime: "Runtime") -> None:
        self._runtime = weakref.ref(runtime)
        self.sequences = Sequences(runtime.plan.sequences)
        self.turns = Turns()

    @property
    def runtime(self) -> "Runtime":
        runtime = self._runtime()
        assert runtime is not None  # its own calls alone come here
        return runtime

    @property
    def plan(self) -> Plan:
        return self.runtime.plan

    @property
    def engine(self) -> "_core.Engine":
        """Raises ValueError where the Runtime is closed."""
        return self.runtime._open()

    def prefill(
        self,
        call: object,
        ids: list[int],
        tokens: list[int],
        rule: PruneRule,
        unwanted: Callable[[], bool],
        progress: Progress | None = None,
    ) -> tuple[np.ndarray, int, float]:
        """Bring a sequence to a prompt's ids and the tokens after it, reusing the beginning that it already holds.

        Returns the last one's logits, how many were computed and how many seconds that took. Under a rule that
        protects tokens of a prompt what came after it is computed one by one, as it was the first time.
        """
        began, whole = time.perf_counter(), ids + tokens
        sequence = self.begin(call, whole, rule)
        shared = len(sequence.tokens)
        chunk, step = self.plan.chunk, 1 if rule.protect else self.plan.chunk
        parts = [ids[at : at + chunk] for at in range(shared, len(ids), chunk)]
        parts += [tokens[at : at + step] for at in range(max(shared - len(ids), 0), len(tokens), step)]
        for number, part in enumerate(parts, start=1):
            if progress:
                progress("prompt", len(sequence.tokens), len(whole))
            logits = self.step(sequence, part, LAST if number == len(parts) else NOTHING, unwanted)
        if progress:
            progress("prompt", len(whole), len(whole))
        sequence.call = call
        return logits[-1], len(whole) - shared, time.perf_counter() - began

    def begin(self, call: object, whole: list[int], rule: PruneRule) -> Sequence:
        """The call's sequence, which holds as many of the first tokens as it can, all but one at the most."""
        sequence = self.sequences.take(call, whole, rule)
        self.rewind(sequence, min(sequence.shares(whole, rule), len(whole) - 1))
        self.engine.set_prune(rule.rule, list(rule.threshold), rule.price, rule.protect, sequence=sequence.number)
        sequence.rule, sequence.call = rule, call
        return sequence

    def rewind(self, sequence: Sequence, position: int) -> None:
        engine = self.engine
        sequence.call = None
        # First: after an interrupt it may be shorter than the KV cache, never longer.
        del sequence.tokens[position:]
        engine.rewind(position, sequence=sequence.number)

    def step(
        self, sequence: Sequence, tokens: list[int], want: int, unwanted: Callable[[], bool] = lambda: False
    ) -> np.ndarray:
        """A step of one sequence: its logits (rows, vocab)."""
        return self.step_of([(sequence, tokens, want)], unwanted)[0]

    def step_of(
        self, parts: list[tuple[Sequence, list[int], int]], unwanted: Callable[[], bool] = lambda: False
    ) -> list[np.ndarray]:
        """A step of some sequences, with tokens of each and how many rows are wanted: logits (rows, vocab) of each."""
        if unwanted():
            self.runtime._open()
            raise _core.Interrupted("interrupted")
        asked = [(sequence.number, np.asarray(tokens, np.int32), want) for sequence, tokens, want in parts]
        try:
            logits = self.engine.step(asked, unwanted)
        except _core.Interrupted:
            self.runtime._open()  # it was closed
            raise
        except _core.KvOverflow:
            raise ValueError(f"{self.runtime.bundle.path}: {self._overflow()}") from None
        except RuntimeError as error:  # of a GPU
            raise OSError(str(error)) from None
        found = []
        for sequence, tokens, want in parts:
            sequence.tokens += tokens
            count = {NOTHING: 0, LAST: 1, ALL: len(tokens)}[want]
            found.append(logits[:count])
            logits = logits[count:]
        for (sequence, _, _), rows in zip(parts, found, strict=True):
            if not np.isfinite(rows).all():
                self.rewind(sequence, 0)  # whatever it came from, no later call may go on from there
                perhaps = f"perhaps {self._overflow()}, or " if self.plan.kv == "float16" else ""
                raise ValueError(
                    f"{self.runtime.bundle.path}: logits are not finite; {perhaps}compress the model again"
                )
        return found

    def together(
        self, requests: Iterable[Request], unwanted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, Generation]]:
        """Pieces of several answers as they come. As many are computed at once as there are sequences; the others wait.

        Each step has the next token of every answer that goes on, and of prompts as many tokens as there is room for.
        """
        waiting, running = deque(requests), {}  # by request: its sequence
        turn = object()
        try:
            while waiting or running:
                with self.turns.take(turn, unwanted):
                    while waiting and len(running) < len(self.sequences.all):
                        request = waiting.popleft()
                        running[request] = self.begin(request.wanted, request.whole, request.rule)
                        request.account.cached_tokens = len(running[request].tokens)
                    pieces = self._step_together(running, unwanted)
                for request, piece in pieces:
                    if piece.finish_reason is not None:
                        self.sequences.leave(request.wanted)
                        del running[request]
                yield from pieces
        finally:
            for request in running:
                self.sequences.leave(request.wanted)
            self.turns.leave(turn)

    def _step_together(
        self, running: dict[Request, Sequence], unwanted: Callable[[], bool]
    ) -> list[tuple[Request, Generation]]:
        pieces = []
        for request in running:
            if request.wanted.is_over():
                pieces.append((request, request.cancelled()))
            elif running[request].call is not request.wanted:  # another call needed it
                running[request] = self.begin(request.wanted, request.whole, request.rule)
        ended = {request for request, _ in pieces}
        parts, room = [], self.plan.chunk
        for request in sorted(running.keys() - ended, key=lambda one: len(one.whole) - len(running[one].tokens)):
            sequence, whole = running[request], request.whole
            left = whole[len(sequence.tokens) :]
            alone = request.rule.protect and len(left) > 1  # a prompt in chunks of its own, then tokens one by one
            if alone and (parts or not room):
                continue
            if alone:
                end = len(request.ids) if len(sequence.tokens) < len(request.ids) else len(sequence.tokens) + 1
                left = left[: min(room, end - len(sequence.tokens))]
            left = left[:room]
            if not left:
                continue
            want = LAST if len(sequence.tokens) + len(left) == len(whole) else NOTHING
            parts.append((request, sequence, left, want))
            room = 0 if alone else room - len(left)
        if not parts:
            return pieces
        with ExitStack() as turns:
            for request, sequence, _, _ in parts:
                turns.enter_context(request.account.turn(sequence.number))
            found = self.step_of([part[1:] for part in parts], unwanted)
            for (request, _, _, want), rows in zip(parts, found, strict=True):
                if want == LAST:
                    if not request.tokens:
                        request.account.prefilled(len(request.ids) - request.account.cached_tokens)
                    pieces.append((request, request.take(rows[-1])))
        return pieces

    def _overflow(self) -> str:
        plan = self.plan
        more = f"{plan.kv_cache_bytes / 1e6:,.1f} MB more for {plan.context:,} tokens of context"
        return f'a key or value is beyond what a KV cache in float16 holds: pass kv="float32" (--kv float32), {more}'
