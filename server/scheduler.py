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
from .errors import ApiError, too_many

IDLE_S = 0.01  # between looks for a sequence that other callers of the Runtime hold


class Inbox:
    """Where the pieces of one request's answers arrive, in the event loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[Answer, Generation | BaseException]] = deque()
        self._changed = asyncio.Event()

    def put(self, answer: "Answer", piece: Generation | BaseException) -> None:
        self._pieces.append((answer, piece))
        self._changed.set()

    async def next(self) -> "tuple[Answer, Generation]":
        """The next piece and its answer. Raises the error that ended one."""
        while not self._pieces:
            self._changed.clear()
            await self._changed.wait()
        answer, piece = self._pieces.popleft()
        if isinstance(piece, BaseException):
            raise piece
        return answer, piece


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
    """Computes answers with a Runtime until it is closed; most: answers that wait at most."""

    def __init__(self, runtime: Runtime, most: int, on_step: Callable[[list], None] = lambda pieces: None) -> None:
        self.runtime, self.most, self.on_step = runtime, most, on_step
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
            waiting = sum(map(len, self._waiting.values()))
            room = self.most + self.runtime.plan.sequences - waiting - len(self.running)
            if len(answers) > max(room, 0):
                raise too_many(f"{waiting} answers wait already, and this request asks for {len(answers)} more")
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

    def _drop_unwanted(self) -> list[tuple[Answer, Generation]]:
        """Remove the waiting answers that are cancelled or late, and return their only pieces."""
        ended = []
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
