"""Processes that work beside this one: forked, so that they begin at once and share its memory.

    with workers(function) as call:                 call(iterator of arguments) -> results, in order

Where there is one core, or the system is not Linux, the function is called in this process. Forked
processes end when their pipe is closed, also because this process was killed: none is left behind.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context, parent_process
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lorafold.errors import LorafoldError
from lorafold.runtime.processor import usable_cores

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

T = TypeVar("T")
PARALLELISM = "TOKENIZERS_PARALLELISM"  # threads of tokenizers, which can't go on in a fork
AHEAD = 3  # calls that wait for each process


def end_with_parent() -> None:
    """Have this process of `multiprocessing` end as soon as its parent does, however that ends."""
    if (parent := parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, name="parent", daemon=True).start()


@contextmanager
def workers(
    function: Callable[..., T],
) -> Iterator[Callable[[Iterator[tuple[Any, ...]]], Iterator[T]]]:
    """Start one process for each core; it yields a function that maps tuples of arguments, which go
    through pipes, to results.

    Raises what the function raises, and LorafoldError if a process was killed.
    """
    count = usable_cores()
    if count == 1 or sys.platform != "linux":
        yield lambda calls: (function(*arguments) for arguments in calls)
        return
    processes = [_Worker(function) for _ in range(count)]
    free: Queue[_Worker[T]] = Queue()
    for process in processes:
        free.put(process)

    def work(*arguments: Any) -> T:
        process = free.get()
        try:
            return process.call(*arguments)
        finally:
            free.put(process)

    with ThreadPoolExecutor(count) as threads:  # one thread waits for each process

        def mapped(calls: Iterator[tuple[Any, ...]]) -> Iterator[T]:
            waiting: deque[Future[T]] = deque()
            for arguments in calls:
                waiting.append(threads.submit(work, *arguments))
                if len(waiting) > AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield mapped
        finally:
            threads.shutdown(cancel_futures=True)
            for process in processes:
                process.close()


class _Worker(Generic[T]):
    """One forked process."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._pipe, other = Pipe()
        process = get_context("fork").Process(target=self._run, args=(other, function), daemon=True)
        before = os.environ.get(PARALLELISM)
        os.environ[PARALLELISM] = "false"
        with warnings.catch_warnings():
            # of threads in this process: the worker uses none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        if before is None:
            del os.environ[PARALLELISM]
        other.close()

    def call(self, *arguments: Any) -> T:
        """The function's result. Raises what it raises, and LorafoldError if the process is gone.
        """
        try:
            self._pipe.send(arguments)
            result = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise LorafoldError(
                "a worker process was killed, perhaps for want of memory"
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Let the process end."""
        self._pipe.close()

    def _run(self, pipe: Connection, function: Callable[..., T]) -> None:
        self._pipe.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
        gc.freeze()  # what the parent had is not looked at again
        with suppress(EOFError, ConnectionError):
            while True:
                arguments = pipe.recv()
                try:
                    pipe.send(function(*arguments))
                except Exception as error:
                    pipe.send(error)
