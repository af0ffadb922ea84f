"""A process that can be killed at any time, with messages in both directions.

A message consists of its length in eight bytes, and its content. Deadlines are times of
time.monotonic(). The process leads its own session, so its children are killed with it, and signals
from the terminal don't reach it.
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

LENGTH_BYTES = 8  # bytes of a message's length


class TimedOut(Exception):
    """The process took too long."""


class TooLarge(Exception):
    """A message exceeds the limit; `size` is in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size:,} bytes")
        self.size = size


class Exited(Exception):
    """The process has ended; `code` is its exit code, or a negative signal number."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def read_message(source: BinaryIO) -> bytes | None:
    """Reads the next message in the worker process; returns None at the end of the stream."""
    head = source.read(LENGTH_BYTES)
    return source.read(int.from_bytes(head, "big")) if len(head) == LENGTH_BYTES else None


class KillableProcess:
    """A process that runs a Python module. It should be killed after any exception, because a
    message may have been cut off.
    """

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
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def write(self, content: bytes, deadline: float) -> None:
        """Writes a framed message. Raises TimedOut or Exited."""
        assert self._process.stdin is not None
        remaining, pipe = memoryview(content), self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        while remaining:
            self._wait(pipe, select.POLLOUT, deadline)
            try:
                remaining = remaining[os.write(pipe, remaining) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Exited(self._process.wait()) from None

    def read(self, deadline: float, max_bytes: int | None = None) -> bytes:
        """Returns the content of the next message. Raises TimedOut, TooLarge or Exited."""
        size = int.from_bytes(self._read(LENGTH_BYTES, deadline), "big")
        if max_bytes is not None and size > max_bytes:
            raise TooLarge(size)
        return self._read(size, deadline)

    def end(self) -> None:
        """Kills the process, even while another thread waits for a message."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.id, signal.SIGKILL)

    def kill(self) -> None:
        """Kills the process and its children, and closes the pipes; no thread may be waiting for a
        message.
        """
        self.end()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process.stdout is not None
        content, pipe = bytearray(), self._process.stdout.fileno()
        while len(content) < size:
            self._wait(pipe, select.POLLIN, deadline)
            part = os.read(pipe, min(size - len(content), 1 << 20))
            if not part:
                raise Exited(self._process.wait())
            content += part
        return bytes(content)

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimedOut
