"""The processes that read what came with adapters, and what becomes of one that goes too far.

A call goes to a process that is idle, or to a new one, and waits for its answer. One that takes too
much of the processor's time is killed by its own limit, and what it was given is refused. One that
gives no answer for long without that is killed too, but its machine is busy: nothing is known of
what it was given then. The next call makes another process.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from lorafold.errors import Busy, LorafoldError
from lorafold.runtime.killable_process import Died, Killable, Large, Late
from lorafold.verification.worker import as_message

# bytes of an answer: nothing else of the server runs while it is taken apart
ANSWER = 8 << 20
WALL, LEAST = 20.0, 60.0  # an answer may take so many times the processor's seconds, or so many
TOLD = 600  # letters of what is told of an error


class Refused(LorafoldError):
    """A process refused what it was given; `kind` is the name of the error there, "" if it died."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Process:
    """One process."""

    def __init__(self, base: bytes) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = Killable("lorafold.verification.worker", offline, quiet=True)
        self._base = base

    def ask(self, message: bytes, seconds: float) -> Any:
        """The answer to a message. Raises Refused and Busy, and then the process is dead."""
        base, self._base = self._base, b""
        until = time.monotonic() + seconds
        try:
            self._process.write(base + message, until)
            content = self._process.read(until, ANSWER)
        except BaseException as error:
            self.kill()
            if isinstance(error, Late):
                raise Busy(f"the machine is busy: no answer within {seconds:.0f} s") from None
            if isinstance(error, Large):
                raise Refused(f"it makes an answer of {error.size:,} bytes") from None
            if isinstance(error, Died):
                late = error.code == -signal.SIGPROF
                why = "it takes too long" if late else "the process that read it died"
                raise Refused(why) from None
            raise
        return json.loads(content)

    def end(self) -> None:
        """Have the process end, while a thread may wait for its answer."""
        self._process.end()

    def kill(self) -> None:
        """End the process, for which nobody waits any more."""
        self._process.kill()


class WorkerPool:
    """As many processes as are used at a time, at most."""

    def __init__(self, base: Callable[[], Any], most: int) -> None:
        self._base, self._most = base, threading.Semaphore(most)
        self._idle: list[Process] = []
        self._busy: set[Process] = set()
        self._lock, self._first = threading.Lock(), b""
        self._closed = False

    def call(self, do: str, *limits: tuple[float, int], **arguments: Any) -> Any:
        """What an act of the worker gives. Raises Refused and Busy."""
        message = as_message({"do": do, "limits": limits} | arguments)
        seconds = sum(limit[0] for limit in limits)
        with self._most:
            process = self._taken()
            try:
                answer = process.ask(message, max(WALL * seconds, LEAST))
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
            self._first = self._first or as_message(self._base())
            process = self._idle.pop() if self._idle else Process(self._first)
            self._busy.add(process)
        return process
