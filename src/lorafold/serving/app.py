"""The web application, and limits on requests and connections.

With httptools, uvicorn limits neither the time to receive a request nor the size of headers, so
`bounded` adds both limits.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic.json_schema import models_json_schema
from pydantic_core import to_json
from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lorafold.errors import EXITS, LorafoldError, truncate
from lorafold.runtime.memory import trim_heap
from lorafold.serving import logs
from lorafold.serving.backend import running
from lorafold.serving.chat import ChatBody
from lorafold.serving.refusals import Refusal, invalid
from lorafold.serving.request_body import Body
from lorafold.serving.routes import completions, messages, models, page, responses
from lorafold.serving.server import (
    RequestRecord,
    Server,
    authorization,
    error_response,
    internal_error,
    json_response,
    record_of,
)
from lorafold.serving.settings import Limits

REQUEST_BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": completions.CompletionsBody,
    "/v1/responses": responses.ResponsesBody,
    "/v1/responses/input_tokens": responses.InputTokens,
    "/v1/messages": messages.MessagesBody,
    "/v1/messages/count_tokens": messages.CountTokens,
    "/tokenize": completions.Tokenize,
    "/detokenize": completions.Detokenize,
    "/v1/load_lora_adapter": models.LoadBody,
    "/v1/unload_lora_adapter": models.UnloadBody,
    "/admin/aliases/{name}": models.AliasBody,
}
SCHEMES = {"key": {"type": "http", "scheme": "bearer"}}
UNLOGGED_PATHS = ("/livez", "/readyz", "/health", "/metrics", *page.FILES)
COMPLETION_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
POLLED_PATHS = ("/v1/models", "/v1/models/events")  # the page polls them; only errors are logged
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
ORIGIN = re.compile(r"^[^/?]*://[^/]*")
MAX_HEAD_BYTES = 1 << 16  # bytes of the request line and headers
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def application(server: Server) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(logs.log_loop_error)
        try:
            async with server.host.computing(), running(server.usage.keep_saving()):
                yield
        finally:
            await server.usage.save()

    app = FastAPI(title="lorafold", lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    for routes in (
        completions.routes, responses.routes, messages.routes, models.routes,
        completions.tokens, models.administration, operation_routes, page.routes,
    ):  # fmt: skip
        routes(app, server)

    @app.get("/openapi.json")
    async def schema(request: Request) -> Response:
        """Returns the OpenAPI description, without authentication."""
        return json_response(openapi_description(app.routes))

    for kind in (Refusal, LorafoldError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(Gate, server=server)
    if server.settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=server.settings.cors, allow_headers=["*"],
            allow_methods=("GET", "POST", "PUT", "DELETE"), allow_private_network=True,
            expose_headers=("X-Request-Id", "Retry-After"),
        )  # fmt: skip
    return app


def operation_routes(app: FastAPI, server: Server) -> None:
    @app.get("/livez")
    async def live() -> Response:
        """Returns 200 while the process answers requests."""
        return json_response({"status": "alive"})

    @app.get("/readyz")
    @app.get("/health")
    async def ready() -> Response:
        """Returns 200 if requests are computed, or 503 with the reason."""
        why = server.host.not_ready
        return json_response({"status": why or "ready"}, 503 if why else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Returns metrics in Prometheus format. If the server has API keys or a metrics key, it
        requires the metrics key or the administrator's key, because labels name tenants.
        """
        server.keys.check_metrics(authorization(request.headers))
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def openapi_description(routes: list[Any]) -> dict[str, Any]:
    openapi = get_openapi(title="lorafold", version="1", routes=routes)
    kinds: Any = [(kind, "validation") for kind in dict.fromkeys(REQUEST_BODIES.values())]
    names, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    for path, kind in REQUEST_BODIES.items():
        content = {"application/json": {"schema": names[kind, "validation"]}}
        for method in openapi["paths"][path].keys() & {"post", "put"}:
            openapi["paths"][path][method]["requestBody"] = {"required": True, "content": content}
    openapi["components"] = {"schemas": schemas.get("$defs", {}), "securitySchemes": SCHEMES}
    return openapi | {"security": [{"key": []}]}


class Gate:
    """Middleware that assigns request ids, rejects bodies that are too large, and counts and logs
    requests when they end.
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        raw_path = ORIGIN.sub("", scope.get("raw_path", b"").decode("ascii", "replace"))
        method = scope["method"] if scope["method"] in METHODS else "other"
        path = scope["path"].rstrip("/") or "/"
        record = RequestRecord(f"req-{secrets.token_hex(8)}", method, path, raw_path)
        # HEAD is routed as GET; uvicorn omits the body of the response
        method = "GET" if method == "HEAD" else scope["method"]
        scope = {**scope, "record": record, "path": path, "method": method}
        read, response_started = 0, False

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            self._check_size(read)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal response_started
            if message["type"] == "http.response.start":
                response_started = True
                record.status = record.status or message["status"]
                message["headers"] = [
                    *message.get("headers", []), (b"x-request-id", record.id.encode()),
                ]  # fmt: skip
            await send(message)

        try:
            try:
                self._check(Headers(scope=scope), record)
            except Refusal as refusal:
                await error_response(record, refusal)(scope, receive, send_with_id)
            else:
                await self.app(scope, bounded, send_with_id)
        except ClientDisconnect:  # the client disconnected while sending the body
            record.outcome, record.status = "client_left", 499
        except SendTimeoutError:
            record.outcome = "slow_reader"
        except asyncio.CancelledError:  # the server's shutdown timed out
            record.outcome, record.status = "not_ready", record.status or 503
            raise
        except EXITS:
            raise
        except BaseException as error:  # a Rust panic of a tokenizer is not an Exception
            failed = internal_error(record, error)
            if not response_started:
                await error_response(record, failed)(scope, receive, send_with_id)
        finally:
            self._count_and_log(record)

    def _check(self, headers: Headers, record: RequestRecord) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 20:  # int() raises for very long numbers
            raise invalid("content-length", f"found {length!r:.40}, expected a number of bytes")
        self._check_size(int(length))
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
        except ValueError:
            host = None
        # DNS rebinding: without keys, a page of another site whose name resolves to this address
        # could act as the user
        keys = self.server.keys
        if keys.file is None and host not in (*LOOPBACK, self.server.settings.host):
            expected = f"expected one of {', '.join(LOOPBACK)}, because the server has no API keys"
            raise Refusal(403, "wrong_host", f"host: found {host!r:.80}, {expected}")
        if record.path in COMPLETION_PATHS and record.method == "POST":
            # checked before the body is read
            caller = keys.caller(authorization(headers))
            record.tenant = caller.tenant
            self.server.admission.check_caller(caller, 1)

    def _check_size(self, nbytes: int) -> None:
        max_bytes = self.server.settings.limits.body_bytes
        if nbytes > max_bytes:
            raise Refusal(413, "body_too_large", f"body: expected at most {max_bytes:,} bytes")

    def _count_and_log(self, record: RequestRecord) -> None:
        if record.path in UNLOGGED_PATHS or (record.path in POLLED_PATHS and record.status < 400):
            return
        if record.status >= 400 and record.outcome == "ok":
            record.outcome = f"status_{record.status}"
        if record.path in COMPLETION_PATHS:
            metrics = self.server.metrics
            metrics.count_request(record.tenant or "none", record.adapter or "none", record.outcome)
        logs.log_request(record)


async def _refused(request: Request, error: Any) -> Response:
    if isinstance(error, LorafoldError):
        error = Refusal(400, "invalid_value", truncate(str(error), 2000))
    elif not isinstance(error, Refusal):  # raised by FastAPI's router
        detail = str(getattr(error, "detail", "not found")).lower()
        message = f"{request.method} {request.url.path[:200]!a}: {detail}"
        error = Refusal(getattr(error, "status_code", 404), "no_route", message)
    return error_response(record_of(request), error)


def bounded(limits: Limits) -> type[HttpToolsProtocol]:
    arriving: dict[Bounded, asyncio.TimerHandle] = {}  # incomplete requests, the oldest first
    trims: list[asyncio.TimerHandle] = []  # at most one is pending

    class Bounded(HttpToolsProtocol):
        """A connection with a time limit for receiving a request. The limit starts with the
        request's first byte or, for the first request, with the connection.
        """

        read, head = 0, True  # bytes of the request, and whether headers are incomplete

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start_timer()
            if len(self.connections) > limits.connections:
                message = "too many connections; try again later"
                next(iter(arriving))._refuse(503, "too_many_connections", message)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.read += len(data)  # includes chunk headers and trailers
            max_bytes = MAX_HEAD_BYTES + (0 if self.head else 2 * limits.body_bytes)
            if self in arriving and self.read > max_bytes:
                status = 431 if self.head else 413
                self._refuse(status, "request_too_large", f"expected at most {max_bytes:,} bytes")

        def on_message_begin(self) -> None:
            self.read, self.head = 0, True
            self._start_timer()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self.head = False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._stop_timer()
            super().on_message_complete()

        def on_response_complete(self) -> None:
            # frees the unread part of a body, and later the memory of a large body
            if self.read > MAX_HEAD_BYTES:
                self._trim_later()
            if not self.pipeline:
                self.cycle.body = bytearray()
            super().on_response_complete()

        @property
        def _busy(self) -> bool:
            return self.head and self.cycle is not None and not self.cycle.response_complete

        def _start_timer(self) -> None:
            self._stop_timer()
            arriving[self] = self.loop.call_later(limits.receive_seconds, self._on_timeout)

        def _stop_timer(self) -> None:
            if (timer := arriving.pop(self, None)) is not None:
                timer.cancel()

        def _on_timeout(self) -> None:
            if self.flow.read_paused or self._busy:  # the server paused reading
                self._start_timer()
            else:
                message = f"expected the whole request within {limits.receive_seconds:g} s"
                self._refuse(408, "request_timeout", message)
                self._trim_later()

        def _trim_later(self) -> None:
            if not trims or trims[-1].when() < self.loop.time():
                trims[:] = [self.loop.call_later(1, self.loop.run_in_executor, None, trim_heap)]

        def _refuse(self, status: int, code: str, message: str) -> None:
            """Closes the connection. If a request has begun and has no response yet, sends an error
            first.
            """
            self._stop_timer()
            if self.read and not self._busy and (self.head or not self.cycle.response_started):
                content = to_json(Refusal(status, code, f"request: {message}").body)
                headers = (
                    f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
                    "connection: close\r\n\r\n"
                )
                self.transport.write(STATUS_LINE[status] + headers.encode() + content)
            self.transport.close()

    return Bounded
