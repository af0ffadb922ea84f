"""Shared by the routes: the server's components, authentication, bodies and answers."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from starlette.datastructures import Headers

from lorafold.errors import THREAD_EXITS
from lorafold.serving.completion_job import DialectRequest, Reply
from lorafold.serving.errors import MESSAGES, Refusal, naming
from lorafold.serving.host import Admission, Host
from lorafold.serving.keys import Caller, Keys, TokenUsage
from lorafold.serving.metrics import Metrics
from lorafold.serving.registry import Registry
from lorafold.serving.request_body import B, new_id, read_body, sse_event
from lorafold.serving.settings import Settings

T = TypeVar("T")
SMALL = 8192  # bytes; larger bodies are parsed in a thread
log = logging.getLogger(__name__)


@dataclass
class Record:
    id: str
    method: str
    path: str
    raw_path: str  # as sent
    started: float = field(default_factory=time.monotonic)
    tenant: str = ""
    adapter: str = ""
    version: str = ""
    status: int = 0
    outcome: str = "ok"
    reply: Reply | None = None
    texts: dict[str, object] = field(default_factory=dict)


@dataclass
class Dialect(ABC):
    """Answers a completion request in the format of one API."""

    body: Any
    request: Any  # the body as a DialectRequest

    @abstractmethod
    async def whole(self, reply: Reply) -> dict[str, Any]:
        """Returns the whole answer."""

    @abstractmethod
    def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """Streams the answer as server-sent events."""


@dataclass
class Server:
    settings: Settings
    keys: Keys
    registry: Registry
    host: Host
    admission: Admission
    metrics: Metrics
    usage: TokenUsage
    # JSON parsing holds the GIL, so only one body is parsed at a time
    parsing: Lock = field(default_factory=Lock)

    def caller(self, request: Request, header: str | None = None) -> Caller:
        caller = self.keys.caller(header or authorization(request.headers))
        record_of(request).tenant = caller.tenant
        return caller

    def admin(self, request: Request) -> Caller:
        caller = self.keys.admin(authorization(request.headers))
        record_of(request).tenant = caller.tenant
        return caller

    async def body(
        self, request: Request, caller: Caller, kind: type[B], then: Callable[[B], T]
    ) -> T:
        """Reads a body and calls `then` with it, in a thread if it is large."""
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":
            message = f"content-type: found {sent[:80]!r}, expected application/json"
            raise Refusal(415, "unsupported_media_type", message)
        with self.host.counted(caller.tenant):  # partial bodies take memory too
            content = await request.body()

        def parsed() -> T:
            with self.parsing:
                body = read_body(kind, content)
            return then(body)

        if len(content) <= SMALL:
            return parsed()
        return await unless_left(request, self.host.think(parsed, caller.tenant))

    async def count(
        self, request: Request, kind: type[B], read: Callable[[Server, B], DialectRequest]
    ) -> int:
        caller = self.caller(request)
        counted = await self.body(request, caller, kind, partial(read, self))
        with naming(counted.names):
            return await self.admission.count(caller, counted)

    async def complete(
        self,
        request: Request,
        kind: type[B],
        read: Callable[[Server, B], DialectRequest],
        dialect_of: type[Dialect],
        id: str,
    ) -> Response:
        """Answers a completion request; `id` is the prefix of its id."""
        caller, record = self.caller(request), record_of(request)
        dialect = await self.body(
            request, caller, kind, lambda body: dialect_of(body, read(self, body))
        )
        admitted = self.admission.admit(caller, new_id(id), record.started, dialect.request)
        with naming(dialect.request.names):
            reply = await unless_left(request, admitted)
            chosen = reply.prompted.chosen
            record.reply, record.adapter = reply, chosen.name
            record.version = chosen.key or chosen.name
            if self.settings.log_texts:
                record.texts["prompt"] = reply.prompted.text
            if dialect.body.stream:
                return self._stream(request, reply, dialect.events(reply))
            try:
                return answer(await unless_left(request, dialect.whole(reply)))
            finally:  # the client may have left
                self.admission.drop(reply)

    def _stream(self, request: Request, reply: Reply, events: AsyncIterator[bytes]) -> Response:
        """Streams events; the completions end if the client leaves or reads too slowly."""
        record, gone, complete = record_of(request), False, False

        async def guarded() -> AsyncIterator[bytes]:
            nonlocal complete
            try:
                async for event in events:
                    yield event
            except Refusal as refusal:
                record.outcome = refusal.code
                yield sse_event(*error_event(record, refusal))
            except asyncio.CancelledError:
                if not gone and record.outcome == "ok":
                    record.outcome = "not_ready"  # the server's shutdown timed out
                raise
            except (*THREAD_EXITS, GeneratorExit):
                raise
            except BaseException as error:  # a Rust panic of a tokenizer is not an Exception
                yield sse_event(*error_event(record, defect(record, error)))
            finally:
                reasons = [why for job in reply.jobs if (why := job.failed or job.why)]
                if reasons and record.outcome in ("ok", "client_left"):
                    record.outcome = reasons[0].code
                self.admission.drop(reply)
                complete = True

        async def left(_: object) -> None:  # may precede the first event or follow the last
            nonlocal gone
            gone = True
            if not complete and any(job.events or job.end is None for job in reply.jobs):
                record.outcome = "client_left"
            self.admission.drop(reply)

        return self.streaming(guarded(), left)

    def streaming(
        self, events: AsyncIterator[bytes], left: Callable[[object], Awaitable[None]]
    ) -> Response:
        """Returns a streaming response; `left` is called if the client leaves or reads too slowly.
        """
        return EventSourceResponse(
            events, ping=15, sep="\n", send_timeout=self.settings.limits.send_seconds,
            client_close_handler_callable=left,
        )  # fmt: skip


def record_of(request: Request) -> Record:
    return request.scope["record"]


def authorization(headers: Headers) -> str | None:
    """Returns the header `Authorization`, or `x-api-key` of Anthropic's clients as one."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


def error_event(record: Record, refusal: Refusal) -> tuple[dict[str, Any], str | None]:
    """Returns a refusal in the route's format, and its event type in a stream."""
    if f"{record.path}/".startswith(f"{MESSAGES}/"):
        return refusal.anthropic(record.id), "error"
    return refusal.body, None


def refused(record: Record, refusal: Refusal) -> Response:
    record.outcome, record.status = refusal.code, refusal.status
    return answer(error_event(record, refusal)[0], refusal.status, refusal.headers)


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def defect(record: Record, error: BaseException) -> Refusal:
    log.error("%s failed", record.id, exc_info=error)
    message = f"internal error; see {record.id} in the server's log"
    record.outcome, record.status = "internal_error", record.status or 500
    return Refusal(500, "internal_error", message)


async def unless_left(request: Request, doing: Coroutine[Any, Any, T]) -> T:
    """Awaits work for a client; cancels it if the client leaves."""
    waiting = asyncio.create_task(doing)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Refusal(499, "client_left", "the client disconnected")
        return waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
