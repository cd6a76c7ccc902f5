"""The routes: who may ask, reading a request's body within limits, and answering whole or as a stream of events."""

import asyncio
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from . import anthropic_messages, openai_chat, openai_completions, openai_responses, tokens
from .errors import ApiError, anthropic_error, invalid, openai_error, too_many
from .events import EventStream, WholeBody
from .memory import Full, Hold, parsed_bytes
from .page import page_routes
from .scheduler import Inbox
from .service import Reading, Service

LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
OPEN = ("/health",)  # without a key
Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, api_key: str | None = None, loopback: bool = False) -> Starlette:
    """The ASGI application. loopback: the server is reached on this machine alone, so that other Host names are a web
    page's attempt to reach it through the browser (DNS rebinding)."""
    door = Door(service, api_key, loopback)

    def post(path: str, handler: Handler) -> Route:
        return Route(path, door.guarded(path, handler), methods=["POST"])

    def get(path: str, handler: Handler) -> Route:
        return Route(path, door.guarded(path, handler), methods=["GET"])

    return Starlette(
        routes=[
            *page_routes(),
            get("/health", door.health),
            get("/metrics", door.metrics),
            get("/v1/models", door.models),
            get("/v1/models/{model:path}", door.model),
            post("/v1/completions", door.answers(openai_completions)),
            post("/v1/chat/completions", door.answers(openai_chat)),
            post("/v1/responses", door.answers(openai_responses)),
            post("/v1/messages", door.answers(anthropic_messages)),
            post("/v1/messages/count_tokens", door.whole(anthropic_messages.count_tokens)),
            post("/v1/embeddings", door.embeddings),
            *(post(f"{at}/tokenize", door.whole(tokens.tokenize)) for at in ("", "/v1")),
            *(post(f"{at}/detokenize", door.whole(tokens.detokenize)) for at in ("", "/v1")),
        ],
        exception_handlers={404: door.no_route, 405: door.no_method},
    )


class Door:
    def __init__(self, service: Service, api_key: str | None, loopback: bool) -> None:
        self.service, self.api_key, self.loopback = service, api_key, loopback

    def guarded(self, path: str, handler: Handler) -> Handler:
        """The handler for those who may ask; errors become bodies of the API that was asked."""

        async def handle(request: Request) -> Response:
            try:
                self._check_caller(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except ApiError as error:
                response = error_response(request, error)
            except Exception as error:  # a fault of this program: told to the client, and in the log
                import traceback

                traceback.print_exc()
                response = error_response(
                    request, ApiError(500, f"{type(error).__name__} in the server", "internal_error")
                )
            self.service.metrics.count(path, response.status_code)
            return response

        return handle

    def _check_caller(self, request: Request) -> None:
        if self.api_key is None:
            host = request.headers.get("host", "")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if self.loopback and name.lower() not in LOOPBACK:
                raise ApiError(
                    403,
                    f"Host {host!r:.80} is not this machine; to serve under other names, give --api-key",
                    "wrong_host",
                )
            return
        if request.url.path in OPEN:
            return
        bearer = request.headers.get("authorization", "")
        key = request.headers.get("x-api-key") or (bearer[7:].strip() if bearer.lower().startswith("bearer ") else "")
        if not key:
            message = (
                "You didn't provide an API key. Provide it in an Authorization header (Authorization: Bearer YOUR_KEY)."
            )
            raise ApiError(401, message, None, None, {"WWW-Authenticate": "Bearer"})
        if not hmac.compare_digest(key.encode(), self.api_key.encode()):
            shown = f"{key[:3]}***{key[-2:]}" if len(key) > 8 else "***"
            raise ApiError(
                401, f"Incorrect API key provided: {shown}.", "invalid_api_key", None, {"WWW-Authenticate": "Bearer"}
            )

    # ---- about the server

    async def health(self, request: Request) -> Response:
        closing = self.service.closing
        return JSONResponse({"status": "shutting down" if closing else "ok"}, status_code=503 if closing else 200)

    async def metrics(self, request: Request) -> Response:
        text = await run_in_threadpool(self.service.metrics.text)
        return PlainTextResponse(text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def models(self, request: Request) -> Response:
        about = [self._about(name) for name in self.service.names]
        both = {"first_id": about[0]["id"], "last_id": about[-1]["id"], "has_more": False}
        return JSONResponse({"object": "list", "data": about, **both})

    async def model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["model"])
        return JSONResponse(self._about(request.path_params["model"]))

    def _about(self, name: str) -> dict:
        plan, started = self.service.runtime.plan, self.service.started
        about = {"id": name, "object": "model", "created": started, "owned_by": "edge-moe"}
        pruning = self.service.runtime.bundle.pruning
        most = pruning.curves[pruning.default].cuts[-1] if pruning else 0.0
        return {**about, "max_model_len": plan.context, "ram_bytes": plan.ram_bytes, "prune_most": most}

    async def embeddings(self, request: Request) -> Response:
        raise ApiError(
            501, "this model predicts text; its hidden states were not trained as embeddings", "unsupported_model"
        )

    async def no_route(self, request: Request, error: Exception) -> Response:
        message = f"Invalid URL ({request.method} {request.url.path:.200})"
        return error_response(request, ApiError(404, message, "unknown_url"))

    async def no_method(self, request: Request, error: Exception) -> Response:
        message = f"Not allowed to {request.method} on {request.url.path:.200}."
        return error_response(request, ApiError(405, message, "method_not_supported"))

    # ---- answers

    def whole(self, function: Callable[[Any, Service], dict]) -> Handler:
        """A handler of a function that computes no tokens."""

        async def handle(request: Request) -> Response:
            with self.service.bodies.hold() as hold:
                body = await self.body(request, hold)
                return JSONResponse(await run_in_threadpool(function, body, self.service))

        return handle

    def answers(self, api: ModuleType) -> Handler:
        async def handle(request: Request) -> Response:
            hold = self.service.bodies.hold()
            try:
                reading, answer = await self._begin(api, request, hold)
                if reading.asked.stream:
                    return EventStream(reading, answer, hold, in_stream(request, answer))
                try:
                    await while_connected(request, self._read_all(reading))
                    return WholeBody(reading, answer, hold)
                except BaseException:
                    reading.cancel()
                    raise
            except BaseException:
                hold.release()
                raise

        return handle

    async def _begin(self, api: ModuleType, request: Request, hold: Hold) -> tuple[Reading, Any]:
        """Read a request and queue its answers; the hold is then as large as what is kept of the body."""
        service = self.service
        body = await self.body(request, hold)
        asked = await run_in_threadpool(api.parse, body, service)
        owner = f"{request.client.host if request.client else ''} {asked.user}"
        inbox = Inbox(service.backlogs, None if asked.stream else service.limits.entries)
        answer = api.Answer(asked, service, secrets.token_hex(12))
        reading = await run_in_threadpool(service.prepare, asked, owner, inbox)
        self._echo(answer, reading)
        answer.prompt_tokens = len(reading.answers[0].request.ids)
        asked.prompts.clear()
        hold.resize(hold.taken // 3)
        reading.submit()
        return reading, answer

    def _echo(self, answer: Any, reading: Reading) -> None:
        """Give an answer of /v1/completions the prompts that it begins with."""
        if reading.asked.echo:
            firsts = [one for one in reading.answers if one.first is None]
            answer.ids = [one.request.ids for one in firsts]
            answer.scores = [one.request.scores.found if one.request.scores else [] for one in firsts]
            decode = self.service.runtime.tokenizer.decode if self.service.runtime.tokenizer else lambda ids: ""
            answer.echoed = [p if isinstance(p, str) else decode(p) for p in reading.asked.prompts]

    async def _read_all(self, reading: Reading) -> None:
        while reading.left:
            await reading.next()

    async def body(self, request: Request, hold: Hold) -> Any:
        """The JSON value of a request's body. Raises ApiError for one that is too large, too slow or not JSON."""
        limits = self.service.limits
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a web page of another origin cannot send this without being allowed to
            raise ApiError(415, f"Content-Type is {kind!r:.60}, expected 'application/json'", "unsupported_media_type")
        said = request.headers.get("content-length", "")
        if said.isdigit() and (len(said) > 15 or int(said) > limits.body_bytes):
            raise too_large(f"is larger than {limits.body_bytes:,} bytes, the server's limit")
        parts: list[bytes] = []
        try:
            with anyio.fail_after(limits.read_s):
                async for part in request.stream():
                    hold.resize(hold.taken + len(part))
                    if hold.taken > limits.body_bytes:
                        raise too_large(f"is larger than {limits.body_bytes:,} bytes, the server's limit")
                    parts.append(part)
            data = b"".join(parts)
            parts.clear()
            hold.resize(parsed_bytes(data))
            return await run_in_threadpool(parsed, data) if len(data) > 65536 else parsed(data)
        except Full as full:
            if full.ever:
                raise too_large("takes more memory than the server has for requests") from None
            raise too_many("the memory for requests is full") from None
        except TimeoutError:
            message = f"the request did not arrive within {limits.read_s:g} seconds"
            raise ApiError(408, message, "request_timeout") from None


def parsed(data: bytes) -> Any:
    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(data, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"We could not parse the JSON body of your request: {why:.200}", None, "invalid_json") from None


def too_large(why: str) -> ApiError:
    return ApiError(413, f"the request {why}", "request_too_large", None, {"Connection": "close"})


def in_stream(request: Request, answer: Any) -> Callable[[ApiError], dict]:
    """The body of an error that ends a stream."""
    if hasattr(answer, "failed"):
        return lambda error: answer.failed(error.code, error.message, error.param)
    return as_body(request)


def as_body(request: Request) -> Callable[[ApiError], dict]:
    return anthropic_error if is_anthropic(request) else openai_error


def is_anthropic(request: Request) -> bool:
    return request.url.path.startswith("/v1/messages") or "anthropic-version" in request.headers


def error_response(request: Request, error: ApiError) -> Response:
    return JSONResponse(as_body(request)(error), status_code=error.status, headers=error.headers)


async def while_connected(request: Request, work: Any) -> None:
    """Await the work. Raises ClientDisconnect, and ends it, if the client goes away."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        for one in (task, watch):
            one.cancel()
