"""The queue of answers, and the thread that computes them all.

One thread advances the Runtime's session: in each step every running answer gets its next token, and prompts get what
room there is. Pieces go to the event loop at once, however slowly a client reads, so no client holds the engine. An
answer that is not wanted any more leaves before the next step, and the step itself is ended where all are unwanted.

Whose turn it is when a sequence is free: owners take turns, each with its oldest answer. Answers that share a prompt
wait for the first of them to compute it, as they then continue from its KV cache.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..runtime.answer import Generation
from ..runtime.request import Request
from ..runtime.runtime import Runtime
from .errors import ApiError, invalid, too_many
from .memory import ENTRY, PIECE, Backlogs, entries_of

IDLE_S = 0.01  # between looks for a sequence that other callers of the Runtime hold


class Inbox:
    """Where the pieces of one request's answers arrive, in the event loop. entries: the log probabilities that it may
    keep until all are there; None if the client gets them as they come."""

    def __init__(self, backlogs: Backlogs, entries: int | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.backlogs, self.entries = backlogs, entries
        self._pieces: deque[tuple[Answer | None, Generation | BaseException]] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, answer: "Answer", piece: Generation | BaseException) -> None:
        if self._closed:
            return
        count = entries_of(piece)
        if self.entries is not None and (entries := self.entries - count) < 0:
            return self.fail(
                invalid("these are too many log probabilities for one body: stream the answer", "logprobs")
            )
        self.entries = None if self.entries is None else entries
        self._pieces.append((answer, piece))
        self._changed.set()
        self.backlogs.add(self, PIECE + ENTRY * count, self._overflow)

    def fail(self, error: ApiError) -> None:
        """End the request with an error in place of what waits."""
        self.close()
        self._pieces.append((None, error))
        self._changed.set()

    def close(self) -> None:
        """Take no more pieces."""
        self._closed = True
        self._pieces.clear()
        self.backlogs.remove(self)

    async def next(self, timeout: float) -> "tuple[Answer, Generation] | None":
        """The next piece and its answer; None if there is none for `timeout` seconds. Raises the error that ended one,
        and ApiError if this is closed."""
        if not self._pieces:
            # Not asyncio.wait_for(), which before Python 3.12 forgets that it was cancelled if the piece comes then.
            self._changed.clear()
            alarm = self.loop.call_later(timeout, self._changed.set)
            try:
                if not self._closed:
                    await self._changed.wait()
            finally:
                alarm.cancel()
        if not self._pieces:
            if self._closed:
                raise ApiError(499, "nobody waits for this answer", "closed")
            return None
        answer, piece = self._pieces.popleft()
        if isinstance(piece, BaseException):
            raise piece
        assert answer is not None  # as errors alone have none
        self.backlogs.remove(self, PIECE + (ENTRY * entries_of(piece) if self.entries is None else 0))
        return answer, piece

    def _overflow(self) -> None:
        self.fail(ApiError(503, "too much of this answer waited for its client to read it", "backlog_full"))


@dataclass(eq=False)
class Answer:
    """An answer that is computed for a client. index: in its request. owner: who takes turns with others. first: the
    answer of the same prompt which computes it."""

    request: Request
    index: int
    owner: str
    inbox: Inbox
    first: "Answer | None" = None
    begun: bool = False  # whether it has a piece
    over: bool = False  # whether it has its last piece


class Scheduler:
    """Computes answers with a Runtime until it is closed. most, most_tokens: answers that wait, and their prompts'."""

    def __init__(
        self, runtime: Runtime, most: int, most_tokens: int, on_step: Callable[[list], None] = lambda pieces: None
    ) -> None:
        self.runtime, self.most, self.most_tokens, self.on_step = runtime, most, most_tokens, on_step
        self.running: dict[Request, Answer] = {}
        self._waiting: dict[str, deque[Answer]] = {}  # by owner, in the order of their turns
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._compute, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def submit(self, answers: list[Answer]) -> None:
        """Queue the answers of one request. Raises ApiError (429) if they are more than the queue has room for."""
        with self._changed:
            if not self._open:
                raise ApiError(503, "the server is shutting down", "shutting_down")
            queued = [one for queue in self._waiting.values() for one in queue if not one.request.wanted.is_over()]
            waiting = len(queued)
            room = self.most + self.runtime.plan.sequences - waiting - len(self.running)
            if len(answers) > max(room, 0):
                raise too_many(f"{waiting} answers wait already, and this request asks for {len(answers)} more")
            tokens = sum(len(one.request.ids) for one in queued)
            if tokens and tokens + sum(len(one.request.ids) for one in answers) > self.most_tokens:
                raise too_many(f"prompts of {tokens:,} tokens wait already")
            for answer in answers:
                self._waiting.setdefault(answer.owner, deque()).append(answer)
            self._changed.notify_all()

    def cancel(self, answers: list[Answer]) -> None:
        """End answers that nobody waits for any more; those that wait leave at once, running ones within a step."""
        for answer in answers:
            answer.request.wanted.cancel()
        with self._changed:
            self._changed.notify_all()

    def cancel_all(self) -> None:
        with self._changed:
            waiting = [answer for queue in self._waiting.values() for answer in queue]
        self.cancel([*self.running.values(), *waiting])

    def close(self) -> None:
        """Take no more answers, cancel those there are, and return when the last one has ended."""
        with self._changed:
            self._open = False
        self.cancel_all()
        self._thread.join()

    def _compute(self) -> None:
        while True:
            with self._changed:
                ended = self._drop_unwanted()
                while not (self.running or self._waiting or ended):
                    if not self._open:
                        return
                    self._changed.wait()
                self._admit()
            self._deliver(ended)
            if not self.running:
                continue
            try:
                pieces = self.runtime._session.advance(lambda: self.runtime.is_open)
            except Exception as error:  # of the engine or a closed Runtime: nobody gets an answer
                pieces = [(request, error) for request in self.running]
                for request in self.running:
                    self.runtime._session.leave(request)
            if not pieces and not any(map(self.runtime._session.sequences.of, (r.wanted for r in self.running))):
                with self._changed:
                    self._changed.wait(IDLE_S)
            self.on_step(pieces)
            found = [(self.running[request], piece) for request, piece in pieces]
            for answer, piece in found:
                answer.begun = True
                if not isinstance(piece, Generation) or piece.finish_reason is not None:
                    answer.over = True
                    del self.running[answer.request]
            self._deliver(found)

    def _drop_unwanted(self) -> list[tuple[Answer, Generation | BaseException]]:
        """Remove the waiting answers that are cancelled or late, and return their only pieces."""
        ended: list[tuple[Answer, Generation | BaseException]] = []
        for owner, queue in list(self._waiting.items()):
            for answer in [one for one in queue if one.request.wanted.is_over()]:
                queue.remove(answer)
                answer.over = True
                ended.append((answer, answer.request.cancelled()))
            if not queue:
                del self._waiting[owner]
        return ended

    def _admit(self) -> None:
        """Let waiting answers join the session while there are sequences."""
        turns = len(self._waiting)
        while self._waiting and turns and len(self.running) < self.runtime.plan.sequences:
            owner = next(iter(self._waiting))
            queue = self._waiting.pop(owner)
            answer = next((one for one in queue if one.first is None or one.first.begun or one.first.over), None)
            turns -= 1
            if answer is not None:
                queue.remove(answer)
                self.running[answer.request] = answer
                self.runtime._session.join(answer.request)
                turns = len(self._waiting) + bool(queue)
            if queue:
                self._waiting[owner] = queue  # behind the other owners

    def _deliver(self, pieces: list[tuple[Answer, Generation | BaseException]]) -> None:
        """Hand pieces to the event loop, each to its answer."""
        if not pieces:
            return

        def deliver() -> None:
            for answer, piece in pieces:
                answer.inbox.put(answer, piece)

        try:
            pieces[0][0].inbox.loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop is closed: nobody reads
            return
