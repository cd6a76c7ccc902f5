"""Whose turn it is to compute, and the stream that a caller holds.

The engine computes one step at a time. A call takes a turn for each of its steps and keeps its place between them, so
others wait; answers that are computed together take turns as one call. It is the call that has the turn, not a thread:
the steps of one stream may be asked for by any thread, as the thread pool of a web server does. A call that asks for
nothing for a while (PATIENCE_S), because its stream was abandoned or its reader is slow, gives way to those that wait.
When it comes back, what its KV cache lost is computed again, which costs time and changes no bit of the result.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Generic, NoReturn, TypeVar

from .. import _core

PATIENCE_S = 0.1  # from a call's step to its next, while others wait
WAKE_S = 0.05  # how often one who waits for a turn looks whether it is still wanted

Piece = TypeVar("Piece", covariant=True)


class Turns:
    """Who computes now, and who is going to go on: any hashable or unhashable object stands for a call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: object | None = None  # a step of this call is being computed
        self._kept_by: object | None = None  # this call has had the last step and may come back
        self._kept_until = 0.0
        self._thread: int | None = None  # that computes it
        self._waiting = 0  # calls, for a turn
        self._interjections = 0  # that wait or run
        self._interjected = False  # since the last step

    @contextmanager
    def take(self, call: object, unwanted: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """A turn for one step of a call. Raises Interrupted when unwanted() is true before it comes."""
        with self._changed:
            self._raise_if_inside()
            self._waiting += 1
            try:
                while not self._free_for(call):
                    if unwanted():
                        raise _core.Interrupted("interrupted")
                    self._changed.wait(WAKE_S)
            finally:
                self._waiting -= 1
            self._kept_by, self._interjected = call, False
            self._begin(call)
        try:
            yield
        finally:
            with self._changed:
                self._end()

    @contextmanager
    def between(self) -> Iterator[None]:
        """Between two steps, whoever computes them: the call that has had the last one goes on afterwards.

        Where calls wait for a turn, a step comes before the next interjection.
        """
        with self._changed:
            self._raise_if_inside()
            while self._interjected and self._waiting:
                self._changed.wait(WAKE_S)
            self._interjections += 1
            try:
                while self._running is not None:
                    self._changed.wait()
            except BaseException:
                self._interjections -= 1
                raise
            self._interjected = True
            self._begin(self)
        try:
            yield
        finally:
            with self._changed:
                self._interjections -= 1
                self._end()

    def leave(self, call: object) -> None:
        """The call has had its last step."""
        with self._changed:
            if self._kept_by is call:
                self._kept_by = None
                self._changed.notify_all()

    def _begin(self, call: object) -> None:
        self._running, self._thread = call, threading.get_ident()

    def _end(self) -> None:
        self._running, self._thread, self._kept_until = None, None, time.monotonic() + PATIENCE_S
        self._changed.notify_all()

    def _raise_if_inside(self) -> None:
        if self._thread == threading.get_ident():
            raise RuntimeError(
                "this thread is computing a step of this Runtime, and would wait for itself; call from another thread"
            )

    def _free_for(self, call: object) -> bool:
        kept = self._kept_by not in (None, call) and time.monotonic() < self._kept_until
        return self._running is None and not kept and not self._interjections


class Wanted:
    """Until when a call is wanted: until it is cancelled, its time is over or its event is set; from any thread."""

    def __init__(self, timeout: float | None = None, stop_event: threading.Event | None = None) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout is {timeout}, expected above 0 seconds")
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._stop_event = stop_event
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def is_over(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._cancelled or late or (self._stop_event is not None and self._stop_event.is_set())


class Stream(Generic[Piece]):
    """Pieces of an answer as they are computed; an iterator and a context manager that closes it.

    Any thread may ask for the next piece or cancel; two that ask at once get one piece each.
    """

    def __init__(self, pieces: Iterator[Piece], wanted: Wanted, leave: Callable[[], None]) -> None:
        self._pieces, self._wanted, self._leave = pieces, wanted, leave
        self._lock = threading.Lock()  # of whoever is asking for a piece
        self._closed = False

    def __iter__(self) -> "Stream[Piece]":
        return self

    def __next__(self) -> Piece:
        with self._lock:
            if self._closed:
                raise StopIteration
            try:
                return next(self._pieces)
            except BaseException:
                self._end()
                raise

    def __enter__(self) -> "Stream[Piece]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End the answer where it is, also in the middle of a step, and return at once.

        The next piece is then the last, with what was held back of the text and the finish_reason "cancelled". May be
        called from any thread, a signal handler's too, and more than once.
        """
        self._wanted.cancel()

    def close(self) -> None:
        """Cancel, wait for the step that is being computed, and give no more pieces."""
        self.cancel()
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._closed = True
        self._leave()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a stream cannot be copied or pickled; it is one answer of one Runtime")


class AsyncStream(Generic[Piece]):
    """A Stream for `async for`: steps are computed in asyncio's threads, so that the event loop goes on meanwhile.

    A task that is cancelled while it waits cancels the answer, too. An asynchronous context manager that closes it.
    """

    def __init__(self, stream: Stream[Piece]) -> None:
        self._stream = stream

    def __aiter__(self) -> "AsyncStream[Piece]":
        return self

    async def __anext__(self) -> Piece:
        import asyncio  # 2 MB, for those who have it

        try:
            pieces = await asyncio.to_thread(lambda: list(islice(self._stream, 1)))
        except asyncio.CancelledError:
            self.cancel()
            raise
        if not pieces:
            raise StopAsyncIteration
        return pieces[0]

    async def __aenter__(self) -> "AsyncStream[Piece]":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def cancel(self) -> None:
        """End the answer where it is; see Stream.cancel()."""
        self._stream.cancel()

    async def aclose(self) -> None:
        """Cancel, wait for the step that is being computed, and give no more pieces."""
        import asyncio

        self.cancel()
        await asyncio.to_thread(self._stream.close)
