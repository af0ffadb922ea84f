"""What the routes share: the parts of a server, the caller of a request, its body and its answer.
"""

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

from lorafold.errors import STOPS
from lorafold.serving.completion_job import DialectRequest, Reply
from lorafold.serving.errors import MESSAGES, Refusal, naming
from lorafold.serving.host import Admission, Host
from lorafold.serving.keys import Caller, Keys, TokenUsage
from lorafold.serving.metrics import Metrics
from lorafold.serving.registry import Registry
from lorafold.serving.request_body import B, new_id, read_body, sse_event
from lorafold.serving.settings import Settings

T = TypeVar("T")
SMALL = 8192  # bytes of a body that the event loop reads itself
log = logging.getLogger(__name__)


@dataclass
class Record:
    """What is counted and logged of one HTTP request once it has ended."""

    id: str
    method: str
    path: str
    raw_path: str  # as the client wrote it
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
    """Abstract: how a request for completions is answered in one of the API's dialects."""

    body: Any
    request: Any  # the body as a DialectRequest

    @abstractmethod
    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as a stream of events."""


@dataclass
class Server:
    """One server's parts."""

    settings: Settings
    keys: Keys
    registry: Registry
    host: Host
    admission: Admission
    metrics: Metrics
    usage: TokenUsage
    # parsing JSON stops all other threads, so one body is parsed at a time
    parsing: Lock = field(default_factory=Lock)

    def caller(self, request: Request, header: str | None = None) -> Caller:
        """Who sent a request, by its headers or by this one in their place."""
        caller = self.keys.caller(header or authorization(request.headers))
        record_of(request).tenant = caller.tenant
        return caller

    def admin(self, request: Request) -> Caller:
        """The administrator; Refusal for everybody else."""
        caller = self.keys.admin(authorization(request.headers))
        record_of(request).tenant = caller.tenant
        return caller

    async def body(
        self, request: Request, caller: Caller, kind: type[B], then: Callable[[B], T]
    ) -> T:
        """Read the body of a request and call `then` with it; large ones beside the event loop."""
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":
            message = f"content-type: found {sent[:80]!r}, expected application/json"
            raise Refusal(415, "unsupported_media_type", message)
        with self.host.counted(caller.tenant):  # a half-sent body takes memory, too
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
        """The number of tokens of a request's prompts."""
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
        """Answer a request for completions in its dialect, by an id that begins with `id`."""
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
            finally:  # also if the client has left
                self.admission.drop(reply)

    def _stream(self, request: Request, reply: Reply, events: AsyncIterator[bytes]) -> Response:
        """Stream events. If the client leaves or reads too slowly, its completions end."""
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
                    record.outcome = "not_ready"  # the server shuts down and no longer waits
                raise
            except (*STOPS, GeneratorExit):
                raise
            except BaseException as error:  # a panic in a tokenizer is no Exception
                yield sse_event(*error_event(record, defect(record, error)))
            finally:
                reasons = [why for job in reply.jobs if (why := job.failed or job.why)]
                if reasons and record.outcome in ("ok", "client_left"):
                    record.outcome = reasons[0].code
                self.admission.drop(reply)
                complete = True

        async def left(_: object) -> None:  # perhaps before the first event, or after the last one
            nonlocal gone
            gone = True
            if not complete and any(job.events or job.end is None for job in reply.jobs):
                record.outcome = "client_left"
            self.admission.drop(reply)

        return self.streaming(guarded(), left)

    def streaming(
        self, events: AsyncIterator[bytes], left: Callable[[object], Awaitable[None]]
    ) -> Response:
        """A response of events; `left` is called if the client leaves or reads too slowly."""
        return EventSourceResponse(
            events, ping=15, sep="\n", send_timeout=self.settings.limits.send_seconds,
            client_close_handler_callable=left,
        )  # fmt: skip


def record_of(request: Request) -> Record:
    """The record of a request, which `app.Gate` made."""
    return request.scope["record"]


def authorization(headers: Headers) -> str | None:
    """The key of a request as a header `Authorization`; Anthropic's clients send `x-api-key`."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


def error_event(record: Record, refusal: Refusal) -> tuple[dict[str, Any], str | None]:
    """A refusal in the dialect of its route, and the type of its event in a stream."""
    if f"{record.path}/".startswith(f"{MESSAGES}/"):
        return refusal.anthropic(record.id), "error"
    return refusal.body, None


def refused(record: Record, refusal: Refusal) -> Response:
    """The answer to a request that is refused."""
    record.outcome, record.status = refusal.code, refusal.status
    return answer(error_event(record, refusal)[0], refusal.status, refusal.headers)


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response of JSON."""
    return Response(to_json(value), status, headers, "application/json")


def defect(record: Record, error: BaseException) -> Refusal:
    """Log an unexpected error and return what the client is told of it."""
    log.error("%s failed", record.id, exc_info=error)
    message = f"the server failed; see its log under {record.id}"
    record.outcome, record.status = "internal_error", record.status or 500
    return Refusal(500, "internal_error", message)


async def unless_left(request: Request, doing: Coroutine[Any, Any, T]) -> T:
    """Await what is done for a client; if the client leaves first, cancel it and raise Refusal."""
    waiting = asyncio.create_task(doing)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise Refusal(499, "client_left", "the client left")
        return waiting.result()
    finally:
        for task in (waiting, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
