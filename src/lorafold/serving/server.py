"""What the routes share, and what every one of them does: who calls, what was asked, what came."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import Response as Plain
from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from starlette.datastructures import Headers

from lorafold.serving.desk import Asked, Desk
from lorafold.serving.host import Host
from lorafold.serving.job import Reply
from lorafold.serving.keys import Caller, Keys
from lorafold.serving.metrics import Metrics
from lorafold.serving.refusal import Refusal
from lorafold.serving.registry import Registry
from lorafold.serving.settings import Settings
from lorafold.serving.wire import messages
from lorafold.serving.wire.answers import event
from lorafold.serving.wire.body import B, read_body

T = TypeVar("T")
LIGHT = 8192  # bytes of a body whose tokens take two milliseconds (a core of an AMD EPYC)
log = logging.getLogger(__name__)


@dataclass
class Record:
    """What there is to say of one HTTP request once it has ended."""

    id: str
    method: str
    path: str
    sent: str  # the path as the client wrote it
    read: int = 0  # bytes of the body
    started: float = field(default_factory=time.monotonic)
    tenant: str = ""
    adapter: str = ""
    version: str = ""
    status: int = 0
    outcome: str = "ok"
    reply: Reply | None = None
    texts: dict[str, object] = field(default_factory=dict)


class Dialect(Protocol):
    """A request for completions in one of the API's dialects: what is asked of the engine, and how
    the answer is written: whole, or as events if it is streamed. `prompt` is for the log.
    """

    streamed: bool

    @property
    def prompt(self) -> object:
        """The prompt, once it was made."""

    def asked(self) -> Asked:
        """What is asked of the engine."""

    async def whole(self, reply: Reply) -> dict[str, Any]:
        """The whole answer."""

    def events(self, reply: Reply) -> AsyncIterator[bytes]:
        """The answer as it comes."""


@dataclass
class Server:
    """One server's parts."""

    settings: Settings
    keys: Keys
    registry: Registry
    host: Host
    desk: Desk
    metrics: Metrics

    def caller(self, request: Request, sent: str | None = None) -> Caller:
        """Who sent a request. Raises Refusal for a key that is not known.

        Args:
            request: the request.
            sent: what counts instead of its headers.
        """
        found = self.keys.caller(sent or authorization(request.headers))
        record_of(request).tenant = found.tenant
        return found

    def admin(self, request: Request) -> Caller:
        """The administrator. Raises Refusal for everybody else."""
        found = self.keys.admin(authorization(request.headers))
        record_of(request).tenant = found.tenant
        return found

    async def body(self, request: Request, kind: type[B]) -> B:
        """The body of a request. Raises Refusal for any but JSON of that type."""
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if given != "application/json":
            told = f"content-type: found {given[:80]!r}, expected application/json"
            raise Refusal(415, "unsupported_media_type", told)
        content = await request.body()
        record_of(request).read = len(content)
        return read_body(kind, content)

    async def complete(
        self, request: Request, caller: Caller, id: str, dialect: Dialect
    ) -> Response:
        """Have completions computed, and answer with them.

        Args:
            request: the request.
            caller: who asks.
            id: the name of the reply.
            dialect: what is asked, and how it is answered.
        """
        record, asked = record_of(request), dialect.asked()
        asked = replace(asked, heavy=asked.heavy or record.read > LIGHT)
        reply = await self.desk.admit(caller, id, record.started, asked)
        record.reply, record.adapter = reply, reply.chosen.name
        record.version = reply.chosen.key or reply.chosen.name
        if self.settings.log_texts:
            record.texts["prompt"] = dialect.prompt
        if dialect.streamed:
            return self._stream(request, reply, dialect.events(reply))
        return answer(await self._whole(request, reply, dialect.whole(reply)))

    async def _whole(self, request: Request, reply: Reply, answer: Awaitable[T]) -> T:
        """What an answer is once it is complete; if the client leaves before, its completions end.

        Args:
            request: the request.
            reply: its completions.
            answer: gives the answer.
        """
        waiting = asyncio.ensure_future(answer)
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise Refusal(499, "client_left", "the client left")
            return waiting.result()
        finally:
            self.desk.drop(reply)
            for task in (waiting, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Refusal):
                    await task

    def _stream(self, request: Request, reply: Reply, events: AsyncIterator[bytes]) -> Response:
        """A response of events. If the client leaves, or reads too slowly, its completions end.

        Args:
            request: the request.
            reply: its completions.
            events: the events, as bytes.
        """
        record = record_of(request)

        async def guarded() -> AsyncIterator[bytes]:
            try:
                async for one in events:
                    yield one
            except Refusal as refusal:
                yield event(*told(record, refusal))
            finally:
                self.desk.drop(reply)
                whys = [job.failed or job.why for job in reply.jobs]
                record.outcome = next((why.code for why in whys if why), record.outcome)

        async def left(_: object) -> None:  # perhaps before the first event was asked for
            self.desk.drop(reply)

        return EventSourceResponse(
            guarded(),
            ping=15,
            sep="\n",
            send_timeout=self.settings.limits.send_seconds,
            client_close_handler_callable=left,
        )


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
    if f"{record.path}/".startswith(f"{messages.PATH}/"):
        return messages.error(refusal, record.id), "error"
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
    return Plain(to_json(value), media_type="application/json")


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
