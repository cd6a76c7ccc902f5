"""Scheduling the steps of concurrent calls on the engine, and the streams that callers hold.

The engine computes one step at a time. A call takes a turn for each of its steps and keeps its place between them, so
others wait; answers that are computed together take turns as one call. A turn belongs to a call, not to a thread: any
thread may ask for a step of a stream, as in the thread pool of a web server. A call that asks for nothing for a while
(PATIENCE_S), because its stream was abandoned or its reader is slow, yields to waiting calls. When it resumes, what was
evicted from its KV cache is recomputed, which costs time but changes no bit of the result.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Generic, NoReturn, TypeVar

from .. import _core

PATIENCE_S = 0.1  # maximum time between two steps of a call while others wait
WAKE_S = 0.05  # interval at which a waiting call checks whether it is still wanted

Piece = TypeVar("Piece", covariant=True)


class Turns:
    """Schedules calls, each identified by any object, hashable or not."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: object | None = None  # a step of this call is being computed
        self._kept_by: object | None = None  # this call had the last step and may continue
        self._kept_until = 0.0
        self._thread: int | None = None  # the thread that computes it
        self._waiting = 0  # number of calls that wait for a turn
        self._interjections = 0  # number that wait or run
        self._interjected = False  # whether there was one since the last step

    @contextmanager
    def take(self, call: object, unwanted: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold a turn for one step of a call. Raises Interrupted if unwanted() becomes true while waiting for it."""
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
        """Hold an interjection between two steps of any call; the call that had the last step continues afterwards.

        If calls wait for a turn, a step comes before the next interjection.
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
        """End a call after its last step."""
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
    """Tells whether a call is still wanted: until it is cancelled, times out, or its event is set, by any thread."""

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
    """An iterator over the pieces of an answer as they are computed; also a context manager that closes it.

    Any thread may ask for the next piece or cancel; two that ask at once get one piece each.
    """

    def __init__(self, pieces: Iterator[Piece], wanted: Wanted, leave: Callable[[], None]) -> None:
        self._pieces, self._wanted, self._leave = pieces, wanted, leave
        self._lock = threading.Lock()  # held while a piece is asked for
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
        """End the answer at once, even in the middle of a step, and return without waiting.

        The next piece is then the last, with the text held back and the finish_reason "cancelled". May be called from
        any thread, from a signal handler, and more than once.
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
    """A Stream for `async for`: steps are computed in asyncio's threads, so that the event loop is not blocked.

    A task that is cancelled while it waits also cancels the answer. It is an asynchronous context manager too.
    """

    def __init__(self, stream: Stream[Piece]) -> None:
        self._stream = stream

    def __aiter__(self) -> "AsyncStream[Piece]":
        return self

    async def __anext__(self) -> Piece:
        import asyncio  # takes 2 MB, so it is imported only when it is used

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
        """End the answer at once; see Stream.cancel()."""
        self._stream.cancel()

    async def aclose(self) -> None:
        """Cancel, wait for the step that is being computed, and give no more pieces."""
        import asyncio

        self.cancel()
        await asyncio.to_thread(self._stream.close)
