"""Scheduling the engine's steps for the calls of a Runtime: whose tokens come next, and reuse of common prefixes.

A running call holds one of the engine's sequences. It reuses what an earlier call left in that sequence's KV cache, as
far as the prompts agree; a longer common prefix in another sequence, such as a system prompt, is copied. A step may
have tokens of several calls, whose results do not depend on one another.
"""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from .. import _core
from .answer import Generation
from .plan import Plan
from .pruning import PruneRule
from .request import Request
from .sequences import Sequence, Sequences
from .session_folder import SessionFolder
from .turns import PATIENCE_S, WAKE_S, Turns

if TYPE_CHECKING:
    from .runtime import Engine, Runtime

NOTHING, LAST, ALL = 0, 1, 2  # rows of logits a step returns
STEP_S = 0.25  # aim for the longest step while answers wait for their next token; a prompt's share of it is cut to fit
LEAST_SHARE = 16  # tokens of prompts in such a step at least
COPIED = 16  # minimum number of tokens, beyond those in its own cache, that are worth copying from another sequence
Part = tuple[Request, Sequence, list[int], int]  # one call's share of a step: its tokens, and the rows wanted
Progress = Callable[[str, int, int], None]  # (phase, done, total)


class Session:
    """The steps of one Runtime, to which it has a weak reference."""

    def __init__(self, runtime: "Runtime") -> None:
        self._runtime = weakref.ref(runtime)
        self.sequences = Sequences(runtime.plan.sequences)
        self.turns = Turns()
        self._turn = object()  # identifies the steps that are computed for all joined answers
        self._changed = threading.Condition()
        self._joined: list[Request] = []
        self._leading = False  # whether a thread is computing a step for all joined answers
        self._alone = False  # whether the last step had tokens of one prompt alone
        self.folder: SessionFolder | None = None  # where sequences are kept that make room for others
        self._token_s = 0.0  # of a prompt's tokens lately, in steps with several: the time of one

    @property
    def runtime(self) -> "Runtime":
        runtime = self._runtime()
        assert runtime is not None  # its own calls alone come here
        return runtime

    @property
    def plan(self) -> Plan:
        return self.runtime.plan

    @property
    def engine(self) -> "Engine":
        """The Runtime's engine. Raises ValueError if the Runtime is closed."""
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
        """Compute a prompt's ids and the tokens after it in the call's sequence, reusing the prefix in its KV cache.

        Returns the logits of the last token, the number of tokens computed, and the seconds that took. Under a rule
        that protects tokens of a prompt, those after the prompt are computed one by one, as they were the first time.
        """
        began, whole = time.perf_counter(), ids + tokens
        sequence = self.begin(call, whole, rule)
        shared = len(sequence.tokens)
        chunk, step = self.plan.chunk, 1 if rule.protect else self.plan.chunk
        while (done := len(sequence.tokens)) < len(whole):
            part = ids[done : done + chunk] or whole[done : done + step]
            part = sequence.until_stop(part)
            if progress:
                progress("prompt", done, len(whole))
            logits = self.step(sequence, part, LAST if done + len(part) == len(whole) else NOTHING, unwanted)
        if progress:
            progress("prompt", len(whole), len(whole))
        return logits[-1], len(whole) - shared, time.perf_counter() - began

    def begin(self, call: object, whole: list[int], rule: PruneRule) -> Sequence:
        """Give the call a sequence that holds the longest available prefix of `whole`, without its last token."""
        alike = [one.shares(whole[:-1], rule) for one in self.sequences.all]
        shared = [self.engine.restorable(count, sequence=number) for number, count in enumerate(alike)]
        sequence = self.sequences.take(call, shared)
        if self.folder and len(sequence.tokens) >= shared[sequence.number] + COPIED:
            self.folder.keep(self, sequence)
        self.truncate(sequence, shared[sequence.number])
        if self.folder:
            shared[sequence.number] = self.folder.fetch(self, sequence, whole[:-1], rule, max(shared))
        other = max(self.sequences.all, key=lambda one: shared[one.number])
        if shared[other.number] >= len(sequence.tokens) + COPIED:
            self.engine.copy_positions(other.number, sequence.number, shared[other.number])
            sequence.tokens[:] = whole[: shared[other.number]]
        sequence.stops = self._stops(whole, max(alike), len(sequence.tokens))
        self.engine.set_prune(rule.rule, list(rule.threshold), rule.price, rule.protect, sequence=sequence.number)
        sequence.rule, sequence.call = rule, call
        return sequence

    def _stops(self, whole: list[int], alike: int, shared: int) -> list[int]:
        """The lengths at which a prompt's recurrent state and windows are kept, for a model with such.

        These are where it departs from an earlier prompt, as others may too, and the end of its last turn, from which
        the next prompt of a conversation usually goes on; or all but the last token, for the same prompt again.
        """
        if not self.plan.snapshots:
            return []
        ends, most = self.runtime._turn_ends, len(whole) - 1
        turn = next((at for at in range(len(whole), 0, -1) if whole[at - 1] in ends), most)
        return sorted({stop for stop in (alike, min(turn, most)) if stop >= shared + COPIED})

    def truncate(self, sequence: Sequence, count: int) -> None:
        """Forget all but the first tokens: so many, or as many of them as the engine can bring the sequence back to."""
        engine = self.engine
        sequence.call = None
        # First: after an interrupt it may be shorter than what the engine holds, never longer.
        del sequence.tokens[count:]
        del sequence.tokens[engine.truncate(count, sequence=sequence.number) :]

    def step(
        self, sequence: Sequence, tokens: list[int], want: int, unwanted: Callable[[], bool] = lambda: False
    ) -> np.ndarray:
        """Compute a step of one sequence and return its logits (rows, vocab)."""
        (rows,) = self.step_of([(sequence, tokens, want)], unwanted)
        if isinstance(rows, Exception):
            raise rows
        return rows

    def step_of(
        self, parts: list[tuple[Sequence, list[int], int]], unwanted: Callable[[], bool] = lambda: False
    ) -> list[np.ndarray | ValueError]:
        """Compute a step of several sequences: (sequence, its tokens, rows wanted) of each.

        Returns for each its logits (rows, vocab), or the error if they are not finite. If this raises, nothing was
        computed."""
        if self.runtime.ranks is None and unwanted():  # else the engine asks, and tells the other ranks
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
        found: list[np.ndarray | ValueError] = []
        for sequence, tokens, want in parts:
            sequence.tokens += tokens
            if len(sequence.tokens) in sequence.stops:
                self.engine.snapshot(sequence.number)
            count = {NOTHING: 0, LAST: 1, ALL: len(tokens)}[want]
            rows, logits = logits[:count], logits[count:]
            found.append(rows if np.isfinite(rows).all() else self._not_finite(sequence))
        return found

    def _not_finite(self, sequence: Sequence) -> ValueError:
        self.truncate(sequence, 0)  # no later call may reuse what led to this
        perhaps = f"perhaps {self._overflow()}, or " if self.plan.kv == "float16" else ""
        return ValueError(f"{self.runtime.bundle.path}: logits are not finite; {perhaps}compress the model again")

    # ---- answers that are computed together

    def join(self, request: Request) -> None:
        """Add an answer to those that are computed together, as soon as a sequence is free for it."""
        with self._changed:
            self._joined.append(request)

    def leave(self, request: Request) -> None:
        """Stop computing an answer; its sequence is free at once, or after the step that is being computed."""
        with self._changed:
            if request in self._joined:
                self._joined.remove(request)
            self.sequences.leave(request.wanted)
            self._changed.notify_all()

    def next(self, request: Request) -> Generation:
        """Return the next piece of a joined answer; any thread may call this.

        If there is none yet, this thread computes a step for all joined answers, unless another thread is doing so.
        Answers that nobody reads from run a few pieces ahead, so that threads which read in turn need not wait.
        """
        while True:
            with self._changed:
                if request.pieces:
                    piece = request.pieces.popleft()
                    request.asked = time.monotonic()
                    if isinstance(piece, BaseException):
                        raise piece
                    return piece
                if self._leading:
                    self._changed.wait(WAKE_S)
                    continue
                self._leading = True
            try:
                self._lead(request)
            finally:
                with self._changed:
                    self._leading = False
                    self._changed.notify_all()

    def advance(self, wait: Callable[[], bool]) -> list[tuple[Request, Generation | BaseException]]:
        """Compute a step for all joined answers, and return their pieces; an answer whose last piece is among them has
        left. For a caller that reads all of them itself, with one thread, instead of next().

        wait: whether to go on waiting for a turn. Waits for other calls' steps, not for answers to join.
        """
        running: dict[Request, Sequence] = {}
        pieces: list[tuple[Request, Generation | BaseException]] = []
        try:
            with self.turns.take(self._turn, lambda: not wait()):
                running = self._running(None)
                pieces = self._step_together(running) if running else []
        except _core.Interrupted:  # all of them are over, and the next step says so
            self.runtime._open()
        for one, piece in pieces:
            if not isinstance(piece, Generation) or piece.finish_reason is not None:
                self.leave(one)
        if not running:
            self.turns.leave(self._turn)
        return pieces

    def _lead(self, request: Request) -> None:
        def over() -> bool:
            return request.wanted.is_over() or not self.runtime.is_open

        running: dict[Request, Sequence] = {}
        try:
            with self.turns.take(self._turn, over):
                running = self._running(request)
                for one, piece in self._step_together(running) if running else []:
                    one.pieces.append(piece)
                    if not isinstance(piece, Generation) or piece.finish_reason is not None:
                        self.leave(one)
        except _core.Interrupted:
            self.runtime._open()
            if not request.wanted.is_over():
                return  # the step was for other answers, which are all cancelled
            self.leave(request)
            request.pieces.append(request.cancelled())
        if not running:  # every sequence has an answer that somebody reads
            with self._changed:
                self._changed.wait(WAKE_S)

    def _running(self, leader: Request | None) -> dict[Request, Sequence]:
        """The answers in the next step, with their sequences: those that do not run too far ahead of their readers."""
        with self._changed:
            joined = list(self._joined)
        running = {}
        for request in joined:
            sequence = self.sequences.of(request.wanted)
            if sequence is None and (request is leader or not request.pieces):
                if not self._is_one_free(joined):
                    continue
                scored = request.scores is not None and not request.tokens
                sequence = self.begin(request.wanted, request.whole[:1] if scored else request.whole, request.rule)
                if not request.tokens:
                    request.account.cached_tokens = len(sequence.tokens)
            if sequence is not None and len(request.pieces) < request.ahead:
                running[request] = sequence
        return running

    def _is_one_free(self, joined: list[Request]) -> bool:
        """Whether a sequence is free; an answer that nobody has read from for a while loses its sequence for that."""
        if any(sequence.call is None for sequence in self.sequences.all):
            return True
        late = time.monotonic() - PATIENCE_S
        for request in joined:
            if len(request.pieces) >= request.ahead and request.asked < late and self.sequences.of(request.wanted):
                self.sequences.leave(request.wanted)
                return True
        return False

    def _step_together(self, running: dict[Request, Sequence]) -> list[tuple[Request, Generation | BaseException]]:
        """Compute a step: the next token of every running answer, and as many tokens of prompts as it has room for."""
        over = [request for request in running if request.wanted.is_over()]
        pieces: list[tuple[Request, Generation | BaseException]] = [(request, request.cancelled()) for request in over]
        parts = self._parts([request for request in running if request not in over], running)
        if not parts:
            return pieces
        try:
            return pieces + self._compute(parts)
        except (ValueError, OSError, MemoryError) as error:  # perhaps one answer's: each is tried alone below
            if len(parts) == 1:
                return [*pieces, (parts[0][0], error)]
        for part in parts:
            try:
                pieces += self._compute([part])
            except (ValueError, OSError, MemoryError) as error:
                pieces.append((part[0], error))
            except _core.Interrupted:  # cancelled; the next step ends it
                continue
        return pieces

    def _parts(self, requests: list[Request], running: dict[Request, Sequence]) -> list[Part]:
        """The tokens of the next step, and the rows of logits wanted, by request.

        Running answers come before prompts, which have equal shares of the room. A prompt whose tokens are protected
        from pruning is computed in steps of its own, which take turns with the others."""
        left = {request: request.whole[len(running[request].tokens) :] for request in requests}
        alone = [request for request in requests if request.rule.protect and len(left[request]) > 1]
        others = sorted((request for request in requests if request not in alone), key=lambda one: len(left[one]))
        self._alone = bool(alone) and not (self._alone and others)
        parts: list[Part] = []
        chosen = alone[:1] if self._alone else others
        room, rows = self._room([left[request] for request in chosen]), self.runtime.logits_rows - len(chosen)
        for place, request in enumerate(chosen):
            sequence, tokens = running[request], left[request]
            if request.rule.protect and len(sequence.tokens) < len(request.ids):
                tokens = tokens[: len(request.ids) - len(sequence.tokens)]
            elif request.rule.protect:
                tokens = tokens[:1]  # one by one, as they were the first time
            tokens = tokens[: -(-room // (len(chosen) - place))]
            scored = request.scores is not None and not request.tokens
            if scored:
                tokens = tokens[: 1 + rows]
                rows -= len(tokens) - 1
            tokens = sequence.until_stop(tokens)
            room -= len(tokens)
            if tokens:
                is_last = len(sequence.tokens) + len(tokens) == len(request.whole)
                parts.append((request, sequence, tokens, ALL if scored else LAST if is_last else NOTHING))
        return parts

    def _room(self, left: list[list[int]]) -> int:
        """The number of tokens in a step that has so many left of each request.

        While some wait for their next token, prompts get as many as are computed in STEP_S, so that a long prompt
        delays nobody's tokens by more, whatever the machine."""
        decoding = sum(len(tokens) == 1 for tokens in left)
        if not 0 < decoding < len(left) or not self._token_s or self.runtime.ranks:  # whose clocks differ
            return self.plan.chunk
        return min(self.plan.chunk, decoding + max(LEAST_SHARE, int(STEP_S / self._token_s)))

    def _compute(self, parts: list[Part]) -> list[tuple[Request, Generation | BaseException]]:
        pieces: list[tuple[Request, Generation | BaseException]] = []

        def unwanted() -> bool:
            return not self.runtime.is_open or all(part[0].wanted.is_over() for part in parts)

        with ExitStack() as turns:
            for request, sequence, _, _ in parts:
                turns.enter_context(request.account.turn(sequence.number))
            began, count = time.perf_counter(), sum(len(part[2]) for part in parts)
            found = self.step_of([part[1:] for part in parts], unwanted)
            if count >= LEAST_SHARE:
                self._token_s = (self._token_s + (time.perf_counter() - began) / count) / (2 if self._token_s else 1)
            for part, rows in zip(parts, found, strict=True):
                try:
                    pieces += self._taken(part, rows)
                except BaseException as error:  # of sampling or progress(): raised to the reader of this answer
                    pieces.append((part[0], error))
        return pieces

    def _taken(self, part: Part, rows: np.ndarray | ValueError) -> list[tuple[Request, Generation | BaseException]]:
        """Turn a request's rows of a step into a piece; a part of a prompt gives none."""
        request, sequence, _, want = part
        if isinstance(rows, ValueError):
            return [(request, rows)]
        if request.progress and not request.tokens:
            request.progress("prompt", len(sequence.tokens), len(request.ids))
        if want == ALL:
            request.scores.add(request.ids[: len(sequence.tokens) + 1], rows)
        if want == NOTHING or len(sequence.tokens) < len(request.ids):
            return []
        if not request.tokens:
            request.account.prefilled(len(request.ids) - request.account.cached_tokens)
        if request.max_tokens == 0:
            return [(request, request.account.piece("", [], "length"))]
        return [(request, request.take(rows[-1]))]

    def _overflow(self) -> str:
        plan = self.plan
        more = f"{plan.kv_cache_bytes / 1e6:,.1f} MB more for {plan.context:,} tokens of context"
        return f'a key or value is beyond what a KV cache in float16 holds: pass kv="float32" (--kv float32), {more}'
