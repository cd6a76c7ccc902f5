"""The processes that mlx.launch has started, each of which runs some of a model's layers: ranks of a ring.

All ranks run the same program. A step goes through them in order: each gets what the one before has computed, and the
last one's result goes round to all. What a rank sends says whether it has failed: an error of one rank is raised on all
of them, in the same step, so none waits for another in vain. That a process has ended is noticed by the ranks that wait
for it.

MLX's ring sends between neighbours alone, and polls while it waits. A message is a head of four numbers, and then as
many bytes as it tells.
"""

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from queue import SimpleQueue
from typing import TypeVar

import mlx.core as mx
import numpy as np

from ... import _core

HEAD = 4  # int32 numbers before a message: whether it is an error, what it is about, bytes of JSON and of data
KINDS = (ValueError, TypeError, OSError, MemoryError, KeyboardInterrupt)
ERRORS = {kind.__name__: kind for kind in (*KINDS, _core.DamagedFile, _core.Interrupted, _core.KvOverflow)}
OUT_OF_STEP = "the ranks are not at the same step: all must make the same calls in the same order"
KNOWN = "edge_moe_on_all_ranks"  # attribute of an error that has been raised on all of them
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank sends to the next."""

    told: dict = field(default_factory=dict)  # what JSON can hold; of an error its kind and text
    data: bytes = b""
    is_error: bool = False
    about: int = 0  # the same on all ranks


@cache
def find_ranks() -> "Ranks | None":
    """The ranks, if mlx.launch has started this process as one of several. Raises ValueError if they do not meet."""
    try:
        group = mx.distributed.init(backend="ring")
    except RuntimeError as error:
        raise ValueError(f"mlx.launch has started this process, but it does not reach the others: {error}") from None
    return Ranks(group) if group.size() > 1 else None


class Ranks:
    """This process among the others, which call the same methods in the same order."""

    def __init__(self, group: mx.distributed.Group):
        self._group, self.rank, self.count = group, group.rank(), group.size()
        self._lost: OSError | None = None
        self._interrupted = False  # Ctrl-C came while a message was under way; it is raised in the next step
        self._one_at_a_time = threading.Lock()
        self._work: SimpleQueue[tuple[Callable, Future]] = SimpleQueue()
        threading.Thread(target=self._send_and_receive, daemon=True, name="edge-moe ranks").start()

    def run(self, about: bytes, compute: Callable[[Message | None], Message]) -> Message:
        """Run a step on all ranks, one after another, and return the last one's message on all.

        compute: takes the message of the rank before, None on the first, and returns its own. about: what the step is;
        it must be the same on all ranks. Raises the error that a rank's compute() raises, on all ranks, ValueError if
        they are not at the same step, and OSError if the connection is lost.
        """
        with self._one_at_a_time:
            return self._step(zlib.crc32(about) & 0x7FFFFFFF, compute)

    def _step(self, number: int, compute: Callable[[Message | None], Message]) -> Message:
        """run(). number: of what the step is, 0 for whatever the other ranks are at."""
        own = None
        try:
            before = self._uninterrupted(self._receive) if self.rank else None
            if before and before.is_error:
                message = before
            elif before and number and before.about != number:
                raise ValueError(OUT_OF_STEP)
            else:
                self._raise_if_interrupted()
                message = compute(before)
        except BaseException as error:
            own, message = error, self._as_message(error)
            if self._lost:
                raise
        result = self._uninterrupted(lambda: self._to_all(replace(message, about=number)))
        error = own or (self._as_error(result) if result.is_error else None)
        if error is not None:
            setattr(error, KNOWN, True)
            raise error
        return result

    def gather(self, about: bytes, own: dict) -> list[dict]:
        """What each rank tells, by rank, on all ranks."""

        def with_own(before: Message | None) -> Message:
            return Message({"all": [*(before.told["all"] if before else []), own]})

        return self.run(about, with_own).told["all"]

    @contextmanager
    def together(self, about: bytes) -> Iterator[None]:
        """Raise an error of the block on all ranks, and go on where all have come through it."""
        try:
            yield
        except BaseException as error:
            if not hasattr(error, KNOWN):
                self._tell(error)
            raise
        self.gather(about, {})

    def _tell(self, error: BaseException) -> None:
        def fail(_: Message | None) -> Message:
            raise error

        with suppress(BaseException), self._one_at_a_time:
            self._step(0, fail)

    def _raise_if_interrupted(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    # ---- errors

    def _as_message(self, error: BaseException) -> Message:
        kind = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS), "")
        text = str(error) or type(error).__name__
        return Message({"kind": kind, "text": f"rank {self.rank}: {text if kind else repr(error)}"}, is_error=True)

    def _as_error(self, message: Message) -> BaseException:
        return ERRORS.get(message.told["kind"], OSError)(message.told["text"])

    # ---- messages, which a thread of their own sends and receives, where Ctrl-C cannot cut one in two

    def _uninterrupted(self, work: Callable[[], Result]) -> Result:
        if self._lost:
            raise OSError(str(self._lost))
        done: Future[Result] = Future()
        self._work.put((work, done))
        while True:
            try:
                return done.result()
            except KeyboardInterrupt:
                if self._interrupted:  # pressed twice: somebody does not want to wait for the other ranks
                    self._lost = OSError(f"rank {self.rank} has left the others in the middle of a step")
                    raise
                self._interrupted = True

    def _send_and_receive(self) -> None:
        while True:
            work, done = self._work.get()
            try:
                done.set_result(work())
            except RuntimeError as error:
                self._lost = OSError(f"rank {self.rank}: another rank has ended, or the connection to it ({error})")
                done.set_exception(self._lost)
                with suppress(RuntimeError):
                    self._send(self._as_message(self._lost))  # to those who wait for this one, if that is possible
            except BaseException as error:
                done.set_exception(error)

    def _to_all(self, message: Message) -> Message:
        """Send a message to the next rank or, on the last one, around to all; returns the last one's."""
        self._send(message)
        if self.rank == self.count - 1:
            return message
        result = self._receive()
        if self.rank < self.count - 2:
            self._send(result)
        return result

    def _send(self, message: Message) -> None:
        text = json.dumps(message.told).encode()
        head = np.array([message.is_error, message.about, len(text), len(message.data)], np.int32)
        for part in (head, np.frombuffer(text + message.data, np.uint8)):
            sent = mx.distributed.send(mx.array(part), (self.rank + 1) % self.count, group=self._group, stream=mx.cpu)
            mx.eval(sent)

    def _receive(self) -> Message:
        is_error, about, text_bytes, data_bytes = self._received(HEAD, mx.int32).tolist()
        body = self._received(text_bytes + data_bytes, mx.uint8).tobytes()
        return Message(json.loads(body[:text_bytes]), body[text_bytes:], bool(is_error), about)

    def _received(self, count: int, dtype: mx.Dtype) -> np.ndarray:
        source = (self.rank - 1) % self.count
        got = mx.distributed.recv((count,), dtype, source, group=self._group, stream=mx.cpu)
        mx.eval(got)  # NumPy would take an error for a reason to try once more, and wait for ever
        return np.array(got)
