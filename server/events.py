"""Sending answers, whole or as a stream of events: as fast as the client reads, and no longer than it listens."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anyio
from starlette.responses import Response

from .errors import ApiError
from .memory import Hold
from .service import Reading

PING = b": waiting\n\n"
PART = 65_536  # bytes of a body that are sent at a time


class Sent(Response):
    """A response that is sent as its client reads, and ended where it takes nothing, or too long for all.

    reading: the answers, submitted already. hold: the memory of the request."""

    def __init__(self, reading: Reading, hold: Hold) -> None:
        self.reading, self.hold = reading, hold
        self.status_code, self.background = 200, None
        self.limits = reading.service.limits

    async def __call__(self, scope, receive, send) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(self._write(send)), asyncio.ensure_future(gone())]
        most = self.limits.timeout_s + self.limits.stall_s
        try:
            ended, _ = await asyncio.wait(tasks, timeout=most, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
            elif not ended:
                raise TimeoutError
        except TimeoutError:  # the client takes nothing
            scope.get("state", {}).get("abort", lambda: None)()
        except OSError:
            pass
        finally:
            self.reading.cancel()
            self.hold.release()
            for one in tasks:
                one.cancel()

    async def _write(self, send) -> None:
        raise NotImplementedError

    async def _send_bytes(self, send, data: bytes) -> None:
        message = {"type": "http.response.body", "body": data, "more_body": True}
        with anyio.fail_after(self.limits.stall_s):
            await send(message)


class WholeBody(Sent):
    """An answer as one JSON text."""

    def __init__(self, reading: Reading, answer: Any, hold: Hold) -> None:
        super().__init__(reading, hold)
        self.data = dumped(answer.whole(reading.tolds))
        reading.tolds.clear()

    async def _write(self, send) -> None:
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(self.data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for at in range(0, len(self.data), PART):
            await self._send_bytes(send, self.data[at : at + PART])
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class EventStream(Sent):
    """answer: gives events' bodies. error: the body of the last one, where an error ends it."""

    def __init__(self, reading: Reading, answer: Any, hold: Hold, error: Callable[[ApiError], dict]) -> None:
        super().__init__(reading, hold)
        self.answer, self.error = answer, error

    async def _write(self, send) -> None:
        head = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        try:
            await self._send(send, self.answer.begin())
            while self.reading.left:
                found = await self.reading.next(self.limits.ping_s)
                if found is None:
                    await self._send_bytes(send, PING)
                    continue
                index, piece, events = found
                reader = self.reading.readers[index]
                await self._send(send, self.answer.add(index, piece, events, reader.called))
            await self._send(send, self.answer.end(self.reading.tolds))
        except ApiError as error:
            await self._send(send, [self.error(error)])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send, bodies: list) -> None:
        if bodies:
            await self._send_bytes(send, b"".join(map(self._event, bodies)))

    def _event(self, body: dict | str) -> bytes:
        data = body.encode() if isinstance(body, str) else dumped(body)
        name = f"event: {body['type']}\n" if isinstance(body, dict) and isinstance(body.get("type"), str) else ""
        return name.encode() + b"data: " + data + b"\n\n"


def dumped(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
