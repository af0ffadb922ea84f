"""Turns rows into tables of tokens; those of large data by worker processes, and once.

    table = tokenized(rows, encoder, console)      a pyarrow.Table, memory-mapped if it is large

An `Encoder` makes a record batch of some rows. The table of large data is kept in the cache, under
the digest of the rows and all that the encoder depends on. `datasets.map` is not used for this: a
killed run would leave its workers and its manager behind, which would keep their memory.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.data.arrow import open_table
from lorafold.data.checking import check_given
from lorafold.data.origins import named
from lorafold.data.sources import Row
from lorafold.data.stored import CHUNK, Rows, in_chunks
from lorafold.errors import LISTED, LorafoldError, listed
from lorafold.files.cache import cached
from lorafold.machine.workers import workers

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

TOKENS = "tokens.arrow"
ROOMS = ("data", "models/templates")  # that make tokens
PACKAGES = ("jinja2", "tokenizers", "transformers")
Chunks = Iterator[tuple[int, list[Any]]]  # (index of the first row, rows)


class Encoder(ABC):
    """Abstract: what makes examples of rows. It is copied into worker processes."""

    @property
    @abstractmethod
    def takes(self) -> str:
        """What it makes examples of, a key of `Shape.gives`."""

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
    def encode(self, given: Sequence[Any], first: int) -> "pa.RecordBatch":
        """The examples of some rows, of which the first has the index `first`.

        Args:
            given: What the shape of each row gives, as `takes` names it.
        """


def tokenized(rows: Rows, encoder: Encoder, console: "Console | None" = None) -> "pa.Table":
    """Return the table of all examples, in the order of the rows.

    Args:
        console: For a progress bar and a notice of how much is written; None is quiet.

    Raises LorafoldError for rows of other shapes than the encoder takes, for rows with problems
    (the first ten are listed), for a full disk, and if a worker process was killed.
    """
    import pyarrow as pa

    check_given(rows.shapes, encoder.takes)
    if not rows.large:
        with _progress(len(rows), console) as counted:
            batches = [_encoded(rows, encoder, *chunk) for chunk in counted(numbered(rows))]
        table = pa.Table.from_batches(batches, encoder.schema)
        refuse_problems(table, rows)
        return table

    def notice(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(directory: Path) -> None:
        first = rows[:CHUNK]
        size = _encoded(rows, encoder, 0, first).nbytes * len(rows) // len(first)
        _check_room(size, directory)
        notice(
            f"tokens: about {size / 1e9:.2f} GB will be kept in {directory.parent} for the next"
            " run; lorafold cache clears it"
        )
        with (
            pa.OSFile(str(directory / TOKENS), "wb") as file,
            pa.ipc.new_stream(file, encoder.schema) as writer,
            workers(partial(_parsed, rows, encoder)) as mapped,
            _progress(len(rows), console) as counted,
        ):
            for batch in mapped(counted(numbered(rows.texts()))):
                writer.write_batch(batch)

    from lorafold.identity import of_code  # which loads torch

    code = of_code(*ROOMS, packages=PACKAGES)
    key = json.dumps([code, rows.sha256, encoder.identity], sort_keys=True)
    table = open_table(cached("tokens", key, write, notice) / TOKENS)
    refuse_problems(table, rows)
    return table


def refuse_problems(table: "pa.Table", rows: Rows) -> None:
    """Raise LorafoldError that lists the first rows with a `problem`, and counts the rest."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # no comparison with "", for which pyarrow would import pandas
    bad = table.filter(pc.binary_length(table.column("problem")).cast(pa.bool_()))
    if not len(bad):
        return
    first = bad.select(["row", "problem"]).slice(0, LISTED).to_pylist()
    places = rows.origins.places(one["row"] for one in first)
    problems = zip(named(places), first, strict=True)
    told = (f"{name}: {one['problem']}" for name, one in problems)
    source = "" if places[0].file else "data: "
    raise LorafoldError(f"{source}{listed(told, '; ', count=len(bad))}")


def numbered(rows: Iterable[Any]) -> Chunks:
    """(index of the first, rows) of each chunk."""
    return ((i * CHUNK, chunk) for i, chunk in enumerate(in_chunks(rows)))


def _encoded(rows: Rows, encoder: Encoder, first: int, chunk: Sequence[Row]) -> "pa.RecordBatch":
    return encoder.encode(rows.given(encoder.takes, chunk, first), first)


def _parsed(rows: Rows, encoder: Encoder, first: int, texts: list[str]) -> "pa.RecordBatch":
    return _encoded(rows, encoder, first, list(map(json.loads, texts)))


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
