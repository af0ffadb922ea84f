"""The server's components, and helpers for routes: authentication, request bodies and responses."""

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

from lorafold.errors import EXITS
from lorafold.serving.completion_job import DialectRequest, Reply
from lorafold.serving.host import Admission, Host
from lorafold.serving.keys import Caller, Keys, TokenUsage
from lorafold.serving.metrics import Metrics
from lorafold.serving.refusals import MESSAGES_PATH, Refusal, client_names
from lorafold.serving.registry import Registry
from lorafold.serving.request_body import B, new_id, read_body, sse_event
from lorafold.serving.settings import Settings

T = TypeVar("T")
MAX_INLINE_BYTES = 8192  # larger bodies are parsed in a thread
log = logging.getLogger(__name__)


@dataclass
class RequestRecord:
    id: str
    method: str
    path: str
    raw_path: str  # as the client sent it
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
    body: Any
    request: Any  # a DialectRequest

    @abstractmethod
    async def full_answer(self, reply: Reply) -> dict[str, Any]:
        """Returns the response if it is not streamed."""

    @abstractmethod
    def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """Yields the response as server-sent events."""


@dataclass
class Server:
    settings: Settings
    keys: Keys
    registry: Registry
    host: Host
    admission: Admission
    metrics: Metrics
    usage: TokenUsage
    # only one body is parsed at a time, because JSON parsing holds the GIL
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
        self, request: Request, caller: Caller, kind: type[B], use: Callable[[B], T]
    ) -> T:
        """Reads a body and calls `use` with it, in a thread if the body is large."""
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":
            message = f"content-type: found {sent[:80]!r}, expected application/json"
            raise Refusal(415, "unsupported_media_type", message)
        with self.host.count_in_admission(caller.tenant):  # because partial bodies need memory
            content = await request.body()

        def parsed() -> T:
            with self.parsing:
                body = read_body(kind, content)
            return use(body)

        if len(content) <= MAX_INLINE_BYTES:
            return parsed()
        return await until_disconnect(request, self.host.in_thread(parsed, caller.tenant))

    async def count(
        self, request: Request, kind: type[B], read: Callable[[Server, B], DialectRequest]
    ) -> int:
        caller = self.caller(request)
        dialect_request = await self.body(request, caller, kind, partial(read, self))
        with client_names(dialect_request.names):
            return await self.admission.count(caller, dialect_request)

    async def complete(
        self,
        request: Request,
        kind: type[B],
        read: Callable[[Server, B], DialectRequest],
        dialect_of: type[Dialect],
        id: str,
    ) -> Response:
        """Responds to a completion request. `id` is the prefix of the response's id."""
        caller, record = self.caller(request), record_of(request)
        dialect = await self.body(
            request, caller, kind, lambda body: dialect_of(body, read(self, body))
        )
        admitted = self.admission.admit(caller, new_id(id), record.started, dialect.request)
        with client_names(dialect.request.names):
            reply = await until_disconnect(request, admitted)
            chosen = reply.resolved.chosen
            record.reply, record.adapter = reply, chosen.name
            record.version = chosen.key or chosen.name
            if self.settings.log_texts:
                record.texts["prompt"] = reply.resolved.text
            if dialect.body.stream:
                return self._stream(request, reply, dialect.events(reply))
            try:
                return json_response(await until_disconnect(request, dialect.full_answer(reply)))
            finally:  # the client may have disconnected
                self.admission.cancel_unfinished(reply)

    def _stream(self, request: Request, reply: Reply, events: AsyncIterator[bytes]) -> Response:
        """Streams events. If the client disconnects or reads too slowly, the completions are
        cancelled.
        """
        record, disconnected, complete = record_of(request), False, False

        async def guarded() -> AsyncIterator[bytes]:
            nonlocal complete
            try:
                async for event in events:
                    yield event
            except Refusal as refusal:
                record.outcome = refusal.code
                yield sse_event(*error_event(record, refusal))
            except asyncio.CancelledError:
                if not disconnected and record.outcome == "ok":
                    record.outcome = "not_ready"  # the server's shutdown timed out
                raise
            except (*EXITS, GeneratorExit):
                raise
            except BaseException as error:  # a Rust panic of a tokenizer is not an Exception
                yield sse_event(*error_event(record, internal_error(record, error)))
            finally:
                reasons = [why for job in reply.jobs if (why := job.failed or job.refusal)]
                if reasons and record.outcome in ("ok", "client_left"):
                    record.outcome = reasons[0].code
                self.admission.cancel_unfinished(reply)
                complete = True

        async def on_disconnect(_: object) -> None:  # may be called before the first event
            nonlocal disconnected
            disconnected = True
            if not complete and any(job.events or job.end is None for job in reply.jobs):
                record.outcome = "client_left"
            self.admission.cancel_unfinished(reply)

        return self.streaming(guarded(), on_disconnect)

    def streaming(
        self, events: AsyncIterator[bytes], on_disconnect: Callable[[object], Awaitable[None]]
    ) -> Response:
        """Returns a streaming response. `on_disconnect` is also called if the client reads too
        slowly.
        """
        return EventSourceResponse(
            events, ping=15, sep="\n", send_timeout=self.settings.limits.send_seconds,
            client_close_handler_callable=on_disconnect,
        )  # fmt: skip


def record_of(request: Request) -> RequestRecord:
    return request.scope["record"]


def authorization(headers: Headers) -> str | None:
    """Returns the `Authorization` header. Anthropic's `x-api-key` is converted to its form."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


def error_event(record: RequestRecord, refusal: Refusal) -> tuple[dict[str, Any], str | None]:
    """Returns an error in the format of the route, and its event type in a stream."""
    if f"{record.path}/".startswith(f"{MESSAGES_PATH}/"):
        return refusal.anthropic(record.id), "error"
    return refusal.body, None


def error_response(record: RequestRecord, refusal: Refusal) -> Response:
    record.outcome, record.status = refusal.code, refusal.status
    return json_response(error_event(record, refusal)[0], refusal.status, refusal.headers)


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def internal_error(record: RequestRecord, error: BaseException) -> Refusal:
    log.error("%s failed", record.id, exc_info=error)
    record.outcome, record.status = "internal_error", record.status or 500
    return Refusal(500, "internal_error", f"internal error; see {record.id} in the server's log")


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    work_task = asyncio.create_task(work)
    disconnect_task = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({work_task, disconnect_task}, return_when=asyncio.FIRST_COMPLETED)
        if not work_task.done():
            raise Refusal(499, "client_left", "the client disconnected")
        return work_task.result()
    finally:
        for task in (work_task, disconnect_task):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
