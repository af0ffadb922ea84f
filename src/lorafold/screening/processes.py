"""The processes that read what came with adapters, and what becomes of one that goes too far.

A call goes to a process that is idle, or to a new one, and waits for its answer. One that takes too
long is killed, by its own limit of the processor's time or by the wall's; the next call makes
another.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lorafold.errors import LorafoldError
from lorafold.screening.worker import SIZE, packed

# bytes of an answer: nothing else of the server runs while it is taken apart
ANSWER = 8 << 20
WALL = 20.0  # how many times the seconds of the processor an answer may take: the machine is busy
TOLD = 600  # letters of what is told of an error


class Refused(LorafoldError):
    """A process refused what it was given; `kind` is the name of the error there, "" if it died."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Process:
    """One process.

    Args:
        base: the first message.
    """

    def __init__(self, base: bytes) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lorafold.screening.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env=os.environ | offline, start_new_session=True,
        )  # fmt: skip
        self._base = base

    def ask(self, message: bytes, seconds: float) -> Any:
        """The answer to a message. Raises Refused, and then the process is dead.

        Args:
            seconds: how long the answer may take.
        """
        base, self._base = self._base, b""
        until = time.monotonic() + seconds
        try:
            self._write(base + message, until)
            size = int.from_bytes(self._read(SIZE, until), "big")
            if size > ANSWER:
                raise Refused(f"it makes an answer of {size:,} bytes")
            content = self._read(size, until)
        except BaseException:
            self.kill()
            raise
        return json.loads(content)

    def end(self) -> None:
        """Have the process end, while a thread may wait for its answer."""
        self._process.kill()

    def kill(self) -> None:
        """End the process, for which nobody waits any more."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _write(self, content: bytes, until: float) -> None:
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
                raise self._died() from None

    def _read(self, size: int, until: float) -> bytes:
        assert self._process.stdout is not None
        found, pipe = bytearray(), self._process.stdout.fileno()
        while len(found) < size:
            self._wait(pipe, select.POLLIN, until)
            part = os.read(pipe, min(size - len(found), 1 << 20))
            if not part:
                raise self._died()
            found += part
        return bytes(found)

    def _wait(self, pipe: int, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise Refused("it takes too long")

    def _died(self) -> Refused:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return Refused("it takes too long")
        return Refused("the process that read it died")


class Processes:
    """As many processes as are used at a time, at most.

    Args:
        base: gives the first message of each.
    """

    def __init__(self, base: Callable[[], Any], most: int) -> None:
        self._base, self._most = base, threading.Semaphore(most)
        self._idle: list[Process] = []
        self._busy: set[Process] = set()
        self._lock, self._first = threading.Lock(), b""
        self._closed = False

    def call(self, do: str, seconds: float, memory: int, **arguments: Any) -> Any:
        """What an act of the worker gives. Raises Refused.

        Args:
            seconds: of the processor, that it may take.
            memory: the bytes that it may take beyond what the process has.
        """
        message = packed({"do": do, "seconds": seconds, "bytes": memory} | arguments)
        with self._most:
            process = self._taken()
            try:
                answer = process.ask(message, max(WALL * seconds, 60.0))
            finally:
                with self._lock:
                    self._busy.discard(process)
            with self._lock:
                if kept := not self._closed:
                    self._idle.append(process)
        if not kept:
            process.kill()
        if "found" in answer:
            return answer["found"]
        told = " ".join(str(answer["wrong"]).split())
        more = len(told) - TOLD
        raise Refused(
            told[:TOLD] + (f" ... ({more:,} letters more)" if more > 0 else ""),
            str(answer.get("kind") or "Error"),
        )

    def close(self) -> None:
        """End them all, and what is asked of them."""
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
            for process in self._busy:
                process.end()
        for process in idle:
            process.kill()

    def _taken(self) -> Process:
        with self._lock:
            if self._closed:
                raise Refused("the server ends")
            self._first = self._first or packed(self._base())
            process = self._idle.pop() if self._idle else Process(self._first)
            self._busy.add(process)
        return process
