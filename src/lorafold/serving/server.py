"""What the routes share, and what every one of them does: who calls, what was asked, what came."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
from lorafold.serving.keys import Caller, Keys, Spent
from lorafold.serving.metrics import Metrics
from lorafold.serving.registry import Registry
from lorafold.serving.request_body import B, event, new_id, read_body
from lorafold.serving.settings import Settings

T = TypeVar("T")
SMALL = 8192  # bytes of a body that the event loop reads itself
log = logging.getLogger(__name__)


@dataclass
class Record:
    """What there is to say of one HTTP request once it has ended."""

    id: str
    method: str
    path: str
    sent: str  # the path as the client wrote it
    started: float = field(default_factory=time.monotonic)
    tenant: str = ""
    adapter: str = ""
    version: str = ""
    status: int = 0
    outcome: str = "ok"
    reply: Reply | None = None
    texts: dict[str, object] = field(default_factory=dict)


class Dialect(ABC):
    """Abstract: a request for completions in one of the API's dialects, which says how the answer
    is written.
    """

    def __init__(
        self, body: Any, asked: DialectRequest, names: Mapping[str, str] | None = None
    ) -> None:
        self.body, self.asked, self.names = body, asked, names or {}

    @abstractmethod
    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes."""


@dataclass
class Server:
    """One server's parts."""

    settings: Settings
    keys: Keys
    registry: Registry
    host: Host
    admission: Admission
    metrics: Metrics
    spent: Spent
    # what parses JSON stops all other threads, so that only one may be about to
    reading: Lock = field(default_factory=Lock)

    def caller(self, request: Request, sent: str | None = None) -> Caller:
        """Who sent a request."""
        found = self.keys.caller(sent or authorization(request.headers))
        record_of(request).tenant = found.tenant
        return found

    def admin(self, request: Request) -> Caller:
        """The administrator."""
        found = self.keys.admin(authorization(request.headers))
        record_of(request).tenant = found.tenant
        return found

    async def body(
        self, request: Request, caller: Caller, kind: type[B], then: Callable[[B], T]
    ) -> T:
        """What is made of the body of a request, beside the event loop if it is large."""
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != "application/json":
            told = f"content-type: found {given[:80]!r}, expected application/json"
            raise Refusal(415, "unsupported_media_type", told)
        with self.host.counted(caller.tenant):  # those that are half sent take memory, too
            content = await request.body()

        def made() -> T:
            with self.reading:
                body = read_body(kind, content)
            return then(body)

        if len(content) <= SMALL:
            return made()
        return await unless_left(request, self.host.think(made, caller.tenant))

    async def count(
        self,
        request: Request,
        kind: type[B],
        then: Callable[[B], tuple[DialectRequest, Mapping[str, str]]],
    ) -> int:
        """The tokens of the prompts of a request."""
        caller = self.caller(request)
        asked, names = await self.body(request, caller, kind, then)
        with naming(names):
            return await self.admission.count(caller, asked)

    async def complete(
        self, request: Request, kind: type[B], then: Callable[[B], Dialect], id: str
    ) -> Response:
        """Have the completions computed that a request asks for, and answer with them."""
        caller, record = self.caller(request), record_of(request)
        dialect = await self.body(request, caller, kind, then)
        admitted = self.admission.admit(caller, new_id(id), record.started, dialect.asked)
        with naming(dialect.names):
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
            finally:  # if the client leaves before, its completions end
                self.admission.drop(reply)

    def _stream(self, request: Request, reply: Reply, events: AsyncIterator[bytes]) -> Response:
        """A response of events. If the client leaves, or reads too slowly, its completions end."""
        record, gone, complete = record_of(request), False, False

        async def guarded() -> AsyncIterator[bytes]:
            nonlocal complete
            try:
                async for one in events:
                    yield one
            except Refusal as refusal:
                record.outcome = refusal.code
                yield event(*told(record, refusal))
            except asyncio.CancelledError:
                if not gone and record.outcome == "ok":
                    record.outcome = "not_ready"  # the server ends, and does not wait any longer
                raise
            except (*STOPS, GeneratorExit):
                raise
            except BaseException as error:  # a panic in a tokenizer is no Exception
                yield event(*told(record, defect(record, error)))
            finally:
                whys = [job.failed or job.why for job in reply.jobs]
                if record.outcome in ("ok", "client_left"):
                    record.outcome = next((why.code for why in whys if why), record.outcome)
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
        """A response of events."""
        return EventSourceResponse(
            events, ping=15, sep="\n", send_timeout=self.settings.limits.send_seconds,
            client_close_handler_callable=left,
        )  # fmt: skip


def record_of(request: Request) -> Record:
    """The record of a request."""
    found: Record = request.scope["record"]
    return found


def authorization(headers: Headers) -> str | None:
    """The key of a request as a header `Authorization`; Anthropic's clients send `x-api-key`."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (None if key is None else f"Bearer {key}")


def told(record: Record, refusal: Refusal) -> tuple[dict[str, Any], str | None]:
    """A refusal in the shape that the clients of its route know, and the type of its event."""
    if f"{record.path}/".startswith(f"{MESSAGES}/"):
        return refusal.anthropic(record.id), "error"
    return refusal.body, None


def refused(record: Record, refusal: Refusal) -> Response:
    """The answer to a request that is refused."""
    record.outcome, record.status = refusal.code, refusal.status
    response = answer(told(record, refusal)[0])
    response.status_code = refusal.status
    response.headers.update(refusal.headers)
    return response


def answer(value: object) -> Response:
    """A response of JSON."""
    return Response(to_json(value), media_type="application/json")


def defect(record: Record, error: BaseException) -> Refusal:
    """The refusal that tells of an error that nothing expected, which is logged."""
    log.error("%s failed", record.id, exc_info=error)
    told = f"the server failed; its log says why under {record.id}"
    failed = Refusal(500, "internal_error", told)
    record.outcome, record.status = failed.code, record.status or failed.status
    return failed


async def unless_left(request: Request, doing: Coroutine[Any, Any, T]) -> T:
    """What something gives that is done for a client; if it leaves before, that is ended, and
    Refusal is raised.
    """
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
