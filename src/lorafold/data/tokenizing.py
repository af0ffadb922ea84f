"""Tokenizes rows to tables. Large data is tokenized in worker processes, and cached under the
digests of the rows and the encoder.

`datasets.map` is not used, because its workers and manager survive if the run is killed.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafold.data.arrow import open_table
from lorafold.data.control_tokens import ROWS_REMARK
from lorafold.data.json_input import Row
from lorafold.data.row_store import CHUNK_ROWS, MAX_IN_MEMORY, Rows, SourcePart, row_names
from lorafold.data.rows import check_provided
from lorafold.errors import MAX_ITEMS, LorafoldError, listed
from lorafold.files.cache import cache_entry
from lorafold.files.terminal import print_lines
from lorafold.runtime.forked_workers import workers

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

TOKENS = "tokens.arrow"
CODE_PATHS = ("data", "models/built_in_templates")  # code that affects the tokens
PACKAGES = ("jinja2", "tokenizers", "transformers")


class Encoder(ABC):
    """Converts rows of the kind `row_content` to examples. It is copied to worker processes."""

    row_content: str

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that examples depend on besides the rows, as JSON."""

    @abstractmethod
    def encode(self, contents: Sequence[Any], first: int) -> pa.RecordBatch:
        """Encodes rows, of which the first has index `first`. The columns include `row` (index),
        `ids` (T,) and `problem`.
        """


@dataclass(frozen=True)
class Encoded:
    """Examples, a printable report on all rows, and the number of rows with examples per source."""

    examples: Any
    report: Any
    parts: tuple[SourcePart, ...]


def with_counts(first: str, *counts: tuple[int, str]) -> str:
    return "\n".join([first, *(f"{count} {text}" for count, text in counts if count)])


@dataclass(frozen=True)
class Report:
    line: str
    max_length: int = 0
    truncated: int = 0
    marked: int = 0

    def __str__(self) -> str:
        cut = f"rows were cut at {self.max_length} tokens"
        return with_counts(self.line, (self.truncated, cut), (self.marked, ROWS_REMARK))


def tokenize_rows(rows: Rows, encoder: Encoder, console: Console | None = None) -> pa.Table:
    """Returns the examples of all rows, in order. Raises if a row has a problem."""
    import pyarrow as pa
    import pyarrow.compute as pc

    check_provided(rows.formats, encoder.row_content)
    if rows.digest_and_size[1] > MAX_IN_MEMORY:
        table = _cached_table(rows, encoder, console)
    else:
        with closing(_chunks(rows.rows, len(rows), console)) as chunks:
            batches = [_encode(rows, encoder, first, chunk) for first, chunk in chunks]
        table = pa.Table.from_batches(batches or [encoder.encode([], 0)])
    # comparing with "" would import pandas
    failed = table.filter(pc.binary_length(table.column("problem")).cast(pa.bool_()))
    if len(failed):
        first = failed.select(["row", "problem"]).slice(0, MAX_ITEMS).to_pylist()
        places = rows.origins.places(one["row"] for one in first)
        problems = zip(row_names(places), first, strict=True)
        lines = (f"{name}: {one['problem']}" for name, one in problems)
        source = "" if places[0].file else "data: "
        raise LorafoldError(f"{source}{listed(lines, '; ', count=len(failed))}")
    return table


def _cached_table(rows: Rows, encoder: Encoder, console: Console | None) -> pa.Table:
    import pyarrow as pa

    def write(directory: Path) -> None:
        first = _encode(rows, encoder, 0, rows[:CHUNK_ROWS])
        size = first.nbytes * len(rows) // min(CHUNK_ROWS, len(rows))
        free = shutil.disk_usage(directory).free
        if free < size:
            raise LorafoldError(
                f"{directory.parent}: found {free / 1e9:.2f} GB free, expected about"
                f" {size / 1e9:.2f} GB for the tokenized rows; free some space, or set"
                " LORAFOLD_CACHE to another directory"
            )
        print_lines(
            console,
            f"tokens: caching about {size / 1e9:.2f} GB in {directory.parent} for the next run;"
            " to clear the cache, run lorafold lab cache --clear",
        )
        with (
            pa.OSFile(str(directory / TOKENS), "wb") as file,
            pa.ipc.new_stream(file, first.schema) as writer,
            workers(partial(_encode_texts, rows, encoder)) as mapped,
            closing(_chunks(rows.texts(), len(rows), console)) as chunks,
        ):
            for batch in mapped(chunks):
                writer.write_batch(batch)

    from lorafold.identity import of_code  # imports torch

    code = of_code(*CODE_PATHS, packages=PACKAGES)
    key = json.dumps([code, rows.sha256, encoder.identity], sort_keys=True)
    return open_table(cache_entry("tokens", key, write, partial(print_lines, console)) / TOKENS)


def _encode(rows: Rows, encoder: Encoder, first: int, chunk: Sequence[Row]) -> pa.RecordBatch:
    return encoder.encode(rows.extract(encoder.row_content, chunk, first), first)


def _encode_texts(rows: Rows, encoder: Encoder, first: int, texts: Sequence[str]) -> pa.RecordBatch:
    return _encode(rows, encoder, first, [*map(json.loads, texts)])


def _chunks(
    rows: Iterable[Any], total: int, console: Console | None
) -> Generator[tuple[int, list[Any]]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("tokenizing", BarColumn(), MofNCompleteColumn(), "rows", TimeRemainingColumn())
    quiet, first, remaining = console is None or not console.is_terminal, 0, iter(rows)
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=total)
        while chunk := list(islice(remaining, CHUNK_ROWS)):
            yield first, chunk
            first += len(chunk)
            bar.update(task, completed=first)
