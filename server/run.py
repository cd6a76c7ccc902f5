"""Running the server until a signal: its socket, the connections' time limits, and an orderly end."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import anyio.to_thread
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import make_app
from .service import Service

BACKLOG = 128
WORKERS = 4  # threads that check and encode requests; encoding is done by one at a time
HEADER_BYTES = 65_536
SEND_BYTES = 131_072  # that the system holds for a client which does not read; without a limit several megabytes
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises OSError, naming the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"{host}: {error.strerror or error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise OSError(f"{host}:{port}: {error.strerror}; choose another --port or --host") from None
    found.setblocking(False)
    return found


def is_loopback(found: socket.socket) -> bool:
    name = found.getsockname()[0]
    return name == "::1" or name.startswith("127.")


def address_of(found: socket.socket, host: str) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{found.getsockname()[1]}"


class Connection(H11Protocol):
    """Aborts a connection whose request does not come; `abort` in a request's state ends one that does not read."""

    read_s = 30.0

    def __init__(self, config, server_state, app_state, _loop=None) -> None:
        super().__init__(config, server_state, {**app_state, "abort": self.abort}, _loop)
        self._overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc) -> None:
        self._expect(False)
        super().connection_lost(exc)

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _expect(self, waits: bool = True) -> None:
        """Give the head of a request that has not come read_s from its first byte on."""
        waits = waits and (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()
        if waits and self._overdue is None:
            self._overdue = self.loop.call_later(self.read_s, self.abort)
        elif not waits and self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None


class Server(uvicorn.Server):
    """Ends running answers within limits.grace_s of the first signal, and at once at the second."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame) -> None:
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        self.service.begin_close()
        running = len(self.service.scheduler.running)
        if running:
            grace = self.service.limits.grace_s
            some = "an answer" if running == 1 else f"{running} answers"
            print(
                f"edge-moe: ending; waits up to {grace:g} s for {some}, once more ends at once",
                file=sys.stderr,
                flush=True,
            )
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, grace, self.service.scheduler.cancel_all)


def run(service: Service, found: socket.socket, api_key: str | None) -> None:
    """Serve until a signal; then the scheduler is closed."""
    limits = service.limits
    config = uvicorn.Config(
        make_app(service, api_key, is_loopback(found)),
        http=type("Connection", (Connection,), {"read_s": limits.read_s}),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=int(limits.grace_s) + 5,
    )

    logging.getLogger("asyncio").setLevel(logging.ERROR)  # which warns of each client that went away

    async def serve() -> None:
        anyio.to_thread.current_default_thread_limiter().total_tokens = WORKERS
        await Server(config, service).serve(sockets=[found])

    try:
        asyncio.run(serve())
    finally:
        service.close()
        found.close()
