"""Requests as they arrive: each has a deadline and a size, and connections are counted.

uvicorn waits for the rest of a request for ever, and keeps headers of any size.
"""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_core import to_json
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lorafold.machine.memory import give_back
from lorafold.serving.refusal import Refusal
from lorafold.serving.settings import Limits

HEAD = 1 << 16  # bytes of an address and headers


def bounded(limits: Limits) -> type[HttpToolsProtocol]:
    """uvicorn's protocol under limits."""
    arriving: dict[Bounded, asyncio.TimerHandle] = {}  # the one that takes longest first
    trims: list[asyncio.TimerHandle] = []  # the last one, for all that were late or large meanwhile

    class Bounded(HttpToolsProtocol):
        """One connection, whose next request is awaited from the start, and from its first byte."""

        read, head = 0, True  # bytes of a request, and whether they are of its head

        def connection_made(self, transport: Any) -> None:
            """Wait for a request, in the place of another connection if there are too many."""
            super().connection_made(transport)
            self._wait()
            if len(self.connections) > limits.connections:
                next(iter(arriving))._refuse(503, "too_many_connections", "try again later")

        def connection_lost(self, exc: Exception | None) -> None:
            """Wait no longer."""
            self._arrived()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """Take some bytes, and no more if there are too many; chunks and trailers count."""
            super().data_received(data)
            self.read += len(data)
            most = HEAD + (0 if self.head else 2 * limits.body_bytes)
            if self in arriving and self.read > most:
                told = f"expected at most {most:,} bytes"
                self._refuse(431 if self.head else 413, "request_too_large", told)

        def on_message_begin(self) -> None:
            """Begin to count."""
            self.read, self.head = 0, True
            self._wait()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            """Allow a body."""
            self.head = False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            """Wait no longer."""
            self._arrived()
            super().on_message_complete()

        def on_response_complete(self) -> None:
            """Forget the part of a body that nobody asked for, and what was made of a large one."""
            if self.read > HEAD:
                self._trim()
            if not self.pipeline:
                self.cycle.body = bytearray()
            super().on_response_complete()

        @property
        def _busy(self) -> bool:
            """Whether the request before this one is still being answered."""
            return self.head and self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            self._arrived()
            arriving[self] = self.loop.call_later(limits.receive_seconds, self._late)

        def _arrived(self) -> None:
            if (timer := arriving.pop(self, None)) is not None:
                timer.cancel()

        def _late(self) -> None:
            if self.flow.read_paused or self._busy:  # here nobody reads
                self._wait()
            else:
                told = f"expected the whole request within {limits.receive_seconds:g} s"
                self._refuse(408, "request_timeout", told)
                self._trim()

        def _trim(self) -> None:
            if not trims or trims[-1].when() < self.loop.time():
                trims[:] = [self.loop.call_later(1, self._give_back)]

        def _give_back(self) -> None:
            self.loop.run_in_executor(None, give_back)

        def _refuse(self, status: int, code: str, told: str) -> None:
            """Close the connection, with an answer if a request has begun that has none yet."""
            self._arrived()
            if self.read and not self._busy and (self.head or not self.cycle.response_started):
                content = to_json(Refusal(status, code, f"request: {told}").body)
                about = f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
                end = b"connection: close\r\n\r\n"
                self.transport.write(STATUS_LINE[status] + about.encode() + end + content)
            self.transport.close()

    return Bounded
