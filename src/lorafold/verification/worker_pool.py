"""A pool of worker processes.

A call runs in an idle process or in a new one. A process that exceeds its CPU limit dies, and the
call raises `CheckFailed`. A process that does not answer in time, although it is within its CPU
limit, is killed and the call raises `Busy`, because the machine and not the input is the cause.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from lorafold.errors import Busy, LorafoldError
from lorafold.runtime.killable_process import Exited, KillableProcess, TimedOut, TooLarge
from lorafold.verification.untrusted_input_worker import encode_message

MAX_ANSWER_BYTES = 8 << 20  # bytes of an answer, because parsing it blocks the server
# wall-time limit of an answer: a multiple of its CPU seconds, or the minimum
WALL_FACTOR, MIN_WALL_SECONDS = 20.0, 60.0
MAX_MESSAGE_LENGTH = 600  # characters of an error's message


class CheckFailed(LorafoldError):
    """A worker process rejected the input. `kind` is the name of the exception in the process, or
    "" if the process died.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class Process(KillableProcess):
    def __init__(self, base: bytes) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        super().__init__("lorafold.verification.untrusted_input_worker", offline, quiet=True)
        self._base = base

    def ask(self, message: bytes, seconds: float) -> Any:
        """Sends a message and returns the answer. Kills the process if anything fails."""
        base, self._base = self._base, b""
        until = time.monotonic() + seconds
        try:
            self.write(base + message, until)
            content = self.read(until, MAX_ANSWER_BYTES)
        except BaseException as error:
            self.kill()
            if isinstance(error, TimedOut):
                raise Busy(f"the machine is busy: no answer within {seconds:.0f} s") from None
            if isinstance(error, TooLarge):
                raise CheckFailed(
                    f"the worker returned {error.size:,} bytes, expected at most"
                    f" {MAX_ANSWER_BYTES:,}"
                ) from None
            if isinstance(error, Exited):
                if error.code == -signal.SIGPROF:
                    raise CheckFailed("CPU time limit exceeded") from None
                raise CheckFailed("the worker process crashed") from None
            raise
        return json.loads(content)


class WorkerPool:
    """Worker processes of one kind. At most `most` run calls at the same time."""

    def __init__(self, base: Callable[[], Any], most: int) -> None:
        self._base, self._most = base, threading.Semaphore(most)
        self._idle: list[Process] = []
        self._busy: set[Process] = set()
        self._lock, self._first = threading.Lock(), b""
        self._closed = False

    def call(self, do: str, *limits: tuple[float, int], **arguments: Any) -> Any:
        """Runs an action in a process. `limits` are the CPU seconds and additional bytes of memory
        for each step of the action. Raises CheckFailed or Busy.
        """
        message = encode_message({"do": do, "limits": limits} | arguments)
        seconds = sum(limit[0] for limit in limits)
        with self._most:
            process = self._process()
            try:
                answer = process.ask(message, max(WALL_FACTOR * seconds, MIN_WALL_SECONDS))
            finally:
                with self._lock:
                    self._busy.discard(process)
            with self._lock:
                closed = self._closed
                if not closed:
                    self._idle.append(process)
        if closed:
            process.kill()
        if "found" in answer:
            return answer["found"]
        why = " ".join(str(answer["wrong"]).split())
        more = len(why) - MAX_MESSAGE_LENGTH
        raise CheckFailed(
            why[:MAX_MESSAGE_LENGTH] + (f" ... ({more:,} more characters)" if more > 0 else ""),
            str(answer.get("kind") or "Error"),
        )

    def close(self) -> None:
        with self._lock:
            self._closed, idle, self._idle = True, self._idle, []
            for process in self._busy:
                process.end()
        for process in idle:
            process.kill()

    def _process(self) -> Process:
        with self._lock:
            if self._closed:
                raise CheckFailed("the server is shutting down")
            self._first = self._first or encode_message(self._base())
            process = self._idle.pop() if self._idle else Process(self._first)
            self._busy.add(process)
        return process
