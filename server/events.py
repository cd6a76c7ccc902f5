"""Answering with a stream of server-sent events, as fast as the client reads, and no longer than it listens."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from .errors import ApiError
from .service import Reading

PING = b": waiting\n\n"


class EventStream(Response):
    """reading: the answers, submitted already. answer: gives events' bodies. error: the body of the last one."""

    def __init__(self, reading: Reading, answer: Any, error: Callable[[ApiError], dict]) -> None:
        self.reading, self.answer, self.error = reading, answer, error
        self.status_code, self.background = 200, None
        self.limits = reading.service.limits

    async def __call__(self, scope, receive, send) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        writing = asyncio.ensure_future(self._write(send))
        watch = asyncio.ensure_future(gone())
        try:
            await asyncio.wait((writing, watch), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        except (TimeoutError, asyncio.TimeoutError):  # the client takes nothing
            scope.get("state", {}).get("abort", lambda: None)()
        except OSError:
            pass
        finally:
            self.reading.cancel()
            for one in (writing, watch):
                one.cancel()

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
                try:
                    index, piece, events = await asyncio.wait_for(self.reading.next(), self.limits.ping_s)
                except (TimeoutError, asyncio.TimeoutError):
                    await self._send_bytes(send, PING)
                    continue
                reader = self.reading.readers[index]
                await self._send(send, self.answer.add(index, piece, events, reader.called))
            await self._send(send, self.answer.end(self.reading.tolds))
        except ApiError as error:
            await self._send(send, [self.error(error)])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send, bodies: list) -> None:
        if bodies:
            await self._send_bytes(send, b"".join(map(self._event, bodies)))

    async def _send_bytes(self, send, data: bytes) -> None:
        message = {"type": "http.response.body", "body": data, "more_body": True}
        await asyncio.wait_for(send(message), self.limits.stall_s)

    def _event(self, body: dict | str) -> bytes:
        data = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        name = f"event: {body['type']}\n" if isinstance(body, dict) and isinstance(body.get("type"), str) else ""
        return f"{name}data: {data}\n\n".encode(errors="replace")
