"""Turns rows into tables of tokens; those of large data by worker processes, and once.

    table = tokenized(rows, encoder, console)      a pyarrow.Table, memory-mapped if it is large

An `Encoder` makes a record batch of some rows. The table of large data is kept in the cache, under
the digest of the rows and all that the encoder depends on. Workers are forked where the system is
Linux; elsewhere the tokenizer's own threads share the work. `datasets.map` is not used for this: a
killed run would leave its workers and its manager behind, which would keep their memory.
"""

import gc
import json
import os
import shutil
import signal
import sys
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import Pipe, get_context
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

from lorafold.data.arrow import open_table
from lorafold.data.checking import LISTED
from lorafold.data.sources import Row
from lorafold.data.stored import CHUNK, Rows, in_chunks
from lorafold.errors import LorafoldError
from lorafold.files.cache import cached
from lorafold.machine.cores import usable_cores

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import pyarrow as pa
    from rich.console import Console

FORMAT = 1  # raise it when tables that were kept by an earlier version must not be used any more
TOKENS = "tokens.arrow"
PARALLELISM = "TOKENIZERS_PARALLELISM"  # of the tokenizer's own threads, which workers don't need
AHEAD = 3  # chunks that wait for each worker
Numbered = tuple[int, list[Row]]
Chunks = Iterator[Numbered]


class Encoder(ABC):
    """Abstract: what makes examples of rows. It is copied into worker processes."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything but the rows that the examples depend on, as JSON."""

    @property
    @abstractmethod
    def schema(self) -> "pa.Schema":
        """The columns of the table. `row` is the row's index, `ids` (T,) are its token ids, and
        `problem` says why the row can't be used.
        """

    @abstractmethod
    def encode(self, rows: Sequence[Row], first: int) -> "pa.RecordBatch":
        """The examples of some rows, of which the first has the index `first`."""


def tokenized(rows: Rows, encoder: Encoder, console: "Console | None" = None) -> "pa.Table":
    """Return the table of all examples, in the order of the rows.

    Args:
        rows: The rows.
        encoder: What makes examples of them.
        console: For a progress bar and a notice of how much is written; None is quiet.

    Raises LorafoldError for rows with problems (the first ten are listed), for a full disk, and if
    a worker process was killed.
    """
    import pyarrow as pa

    chunks = _numbered(rows)
    if not rows.large:
        with _progress(len(rows), console) as counted:
            batches = [encoder.encode(chunk, first) for first, chunk in counted(chunks)]
        table = pa.Table.from_batches(batches, encoder.schema)
        refuse_problems(table)
        return table

    def notice(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(directory: Path) -> None:
        first = rows[:CHUNK]
        size = encoder.encode(first, 0).nbytes * len(rows) // len(first)
        _check_room(size, directory)
        notice(
            f"tokens: about {size / 1e9:.2f} GB will be kept in {directory.parent} for the next"
            " run; lorafold cache clears it"
        )
        with (
            pa.OSFile(str(directory / TOKENS), "wb") as file,
            pa.ipc.new_stream(file, encoder.schema) as writer,
            _workers(encoder) as worked,
            _progress(len(rows), console) as counted,
        ):
            for batch in worked(counted(chunks)):
                writer.write_batch(batch)

    key = json.dumps([FORMAT, rows.sha256, encoder.identity], sort_keys=True)
    table = open_table(cached("tokens", key, write, notice) / TOKENS)
    refuse_problems(table)
    return table


def refuse_problems(table: "pa.Table") -> None:
    """Raise LorafoldError that lists the first ten rows with a `problem`, and counts the rest."""
    import pyarrow.compute as pc

    bad = table.filter(pc.not_equal(table.column("problem"), ""))
    if not len(bad):
        return
    listed = [f"row {r['row'] + 1}: {r['problem']}" for r in bad.slice(0, LISTED).to_pylist()]
    more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    raise LorafoldError(f"data: {'; '.join(listed)}{more}")


def _numbered(rows: Rows) -> Iterator[Numbered]:
    """(index of the first, rows) of each chunk."""
    return ((i * CHUNK, chunk) for i, chunk in enumerate(in_chunks(rows)))


def _check_room(expected: int, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < expected:
        raise LorafoldError(
            f"{directory.parent}: found {free / 1e9:.2f} GB free, expected about"
            f" {expected / 1e9:.2f} GB for the tokens of the rows; LORAFOLD_CACHE names another"
            " directory"
        )


@contextmanager
def _progress(total: int, console: "Console | None") -> Iterator[Callable[[Chunks], Chunks]]:
    """A progress bar with the time left; it yields a function that counts chunks as they pass."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("tokenizing", BarColumn(), MofNCompleteColumn(), "rows", TimeRemainingColumn())
    quiet = console is None or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=total)

        def counted(chunks: Chunks) -> Chunks:
            for first, chunk in chunks:
                yield first, chunk
                bar.update(task, completed=first + len(chunk))

        yield counted


@contextmanager
def _workers(encoder: Encoder) -> "Iterator[Callable[[Chunks], Iterator[pa.RecordBatch]]]":
    """Worker processes; it yields a function that gives the batches of chunks, in their order."""
    cores = usable_cores()
    if cores == 1 or sys.platform != "linux":
        yield lambda chunks: (encoder.encode(chunk, first) for first, chunk in chunks)
        return
    workers = [_Worker(encoder) for _ in range(cores)]
    free: Queue[_Worker] = Queue()
    for worker in workers:
        free.put(worker)

    def work(first: int, chunk: list[Row]) -> "pa.RecordBatch":
        worker = free.get()
        try:
            return worker.encode(chunk, first)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(cores) as threads:  # one thread waits for each worker

        def worked(chunks: Chunks) -> "Iterator[pa.RecordBatch]":
            waiting: deque[Future[pa.RecordBatch]] = deque()
            for first, chunk in chunks:
                waiting.append(threads.submit(work, first, chunk))
                if len(waiting) > AHEAD * cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield worked
        finally:
            threads.shutdown(cancel_futures=True)
            for worker in workers:
                worker.close()


class _Worker:
    """A forked process that encodes chunks. It ends when its pipe is closed, also because the
    process that made it was killed.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._pipe, other = Pipe()
        process = get_context("fork").Process(target=self._run, args=(other, encoder), daemon=True)
        before = os.environ.get(PARALLELISM)
        os.environ[PARALLELISM] = "false"
        with warnings.catch_warnings():
            # of threads in this process: the worker uses none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        if before is None:
            del os.environ[PARALLELISM]
        other.close()

    def encode(self, rows: list[Row], first: int) -> "pa.RecordBatch":
        """What the encoder makes of the rows. Raises what it raises, and LorafoldError if the
        process is gone.
        """
        try:
            self._pipe.send((rows, first))
            found = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise LorafoldError(
                "tokenizing: a worker process was killed, perhaps for want of memory"
            ) from error
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Let the process end."""
        self._pipe.close()

    def _run(self, pipe: "Connection", encoder: Encoder) -> None:
        self._pipe.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
        gc.freeze()  # what the parent had is not looked at again
        with suppress(EOFError, ConnectionError):
            while True:
                rows, first = pipe.recv()
                try:
                    pipe.send(encoder.encode(rows, first))
                except Exception as error:
                    pipe.send(error)
