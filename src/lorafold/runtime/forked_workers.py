"""Worker processes, which are forked so that they start at once and share memory. They end when
their pipe closes, so no worker is left behind if this process is killed.
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
PARALLELISM = "TOKENIZERS_PARALLELISM"  # tokenizers' threads don't survive a fork
QUEUED_PER_PROCESS = 3  # queued calls per process


def end_with_parent() -> None:
    """Makes this `multiprocessing` process exit as soon as its parent has ended in any way."""
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
    """Starts one process per core, and yields a function that maps tuples of arguments to results,
    in order. With one core, or on systems other than Linux, it runs in this process. Exceptions of
    `function` are raised here.
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

    with ThreadPoolExecutor(count) as threads:  # one per process

        def mapped(calls: Iterator[tuple[Any, ...]]) -> Iterator[T]:
            waiting: deque[Future[T]] = deque()
            for arguments in calls:
                waiting.append(threads.submit(work, *arguments))
                if len(waiting) > QUEUED_PER_PROCESS * count:
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
    def __init__(self, function: Callable[..., T]) -> None:
        self._pipe, other = Pipe()
        process = get_context("fork").Process(target=self._run, args=(other, function), daemon=True)
        before = os.environ.get(PARALLELISM)
        os.environ[PARALLELISM] = "false"
        with warnings.catch_warnings():
            # warns about threads in this process, whose locks the worker doesn't use
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        if before is None:
            del os.environ[PARALLELISM]
        other.close()

    def call(self, *arguments: Any) -> T:
        try:
            self._pipe.send(arguments)
            result = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise LorafoldError(
                "a worker process was killed, perhaps for lack of memory"
            ) from error
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self._pipe.close()

    def _run(self, pipe: Connection, function: Callable[..., T]) -> None:
        self._pipe.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
        gc.freeze()  # don't touch, and so copy, the parent's pages
        with suppress(EOFError, ConnectionError):
            while True:
                arguments = pipe.recv()
                try:
                    pipe.send(function(*arguments))
                except Exception as error:
                    pipe.send(error)
