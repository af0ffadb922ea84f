"""A process that can be killed whatever it does, and the messages to it and from it.

    process = Killable("lorafold.verification.worker")          `python -P -m` runs that module in
    it process.write(packed(content), until)
    content = process.read(until)

A message is eight bytes with the length of its content, and the content. Writing and reading end at
a time of the monotonic clock. The process leads a session of its own, so that what it starts is
killed with it, and a signal from the terminal doesn't reach it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO

SIZE = 8  # bytes before a message


class Late(Exception):
    """The process took too long."""


class Large(Exception):
    """The process makes a message of more bytes than it may; `size` is their number."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size:,} bytes")
        self.size = size


class Died(Exception):
    """The process is gone; `code` is as that of `subprocess`, the negative number of a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def packed(content: bytes) -> bytes:
    """A message: the content with its length before it."""
    return len(content).to_bytes(SIZE, "big") + content


def read(source: BinaryIO) -> bytes | None:
    """The content of the next message, as the process itself reads it; None at the end."""
    head = source.read(SIZE)
    return source.read(int.from_bytes(head, "big")) if len(head) == SIZE else None


class Killable:
    """One process. Whatever its methods raise, it should be killed then."""

    def __init__(
        self, module: str, environment: Mapping[str, str] | None = None, quiet: bool = False
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None, bufsize=0,
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip

    @property
    def id(self) -> int:
        """The number that the system knows it by."""
        return self._process.pid

    @property
    def lives(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def write(self, content: bytes, until: float) -> None:
        """Write messages to it. Raises Late and Died."""
        assert self._process.stdin is not None
        left, pipe = memoryview(content), self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        while left:
            self._wait(pipe, select.POLLOUT, until)
            try:
                left = left[os.write(pipe, left) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Died(self._process.wait()) from None

    def read(self, until: float, most: int | None = None) -> bytes:
        """The content of the next message that it makes. Raises Late, Large and Died."""
        size = int.from_bytes(self._read(SIZE, until), "big")
        if most is not None and size > most:
            raise Large(size)
        return self._read(size, until)

    def end(self) -> None:
        """Kill it, while a thread may wait for its messages."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.id, signal.SIGKILL)

    def kill(self) -> None:
        """Kill it and everything that it started, once no thread waits for it."""
        self.end()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _read(self, size: int, until: float) -> bytes:
        assert self._process.stdout is not None
        content, pipe = bytearray(), self._process.stdout.fileno()
        while len(content) < size:
            self._wait(pipe, select.POLLIN, until)
            part = os.read(pipe, min(size - len(content), 1 << 20))
            if not part:
                raise Died(self._process.wait())
            content += part
        return bytes(content)

    def _wait(self, pipe: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise Late
