"""Rows that are read while a run trains: data of any size, of which nothing is kept.

    stream = stream_of(["rows.jsonl", "owner/name:0.3"])
    for name, row, shape in stream.rows(seed, 10_000): ...

Each row comes from a source that is drawn with a probability in proportion to its weight. A source
that ends begins again. Rows pass through a buffer, from which one is drawn for each that enters.
Both draws are seeded: step i of a run has the same rows whenever it is read, and a run that is
resumed reads the rows of the steps before and leaves them out.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from lorafold.data.arrow import Lists
from lorafold.data.batches import BatchFeed
from lorafold.data.control_tokens import MARKED
from lorafold.data.examples import Examples
from lorafold.data.json_input import Row
from lorafold.data.rows import Noticed, check_given, checked, renamed
from lorafold.data.shapes import Shape, shapes_for
from lorafold.data.sources import DataSource, source_from
from lorafold.data.tokenizing import Encoder
from lorafold.errors import LorafoldError

Named = tuple[str, Row, Shape]  # the name of a row in messages, the row, and its shape
PEEKED = 100  # rows that are looked at before a run starts


@dataclass(frozen=True)
class RowStream:
    """Sources that are read row by row, the names that keys have in them, and what is asked of
    them, as for `read_rows`.
    """

    sources: tuple[DataSource, ...]
    columns: Mapping[str, str]
    wanted: str = ""

    @cached_property
    def identity(self) -> str:
        """What a resumed run must have in common with the one before: the names, and what tells
        whether the rows are the same, but for a dataset of the hub.
        """
        local = [s.identity if s.several or Path(s.name).exists() else "" for s in self.sources]
        return " ".join(f"{s} {of}".strip() for s, of in zip(self.sources, local, strict=True))

    @property
    def record(self) -> dict[str, Any]:
        """What an adapter's record says of them."""
        return {"streamed": self.identity}

    def rows(self, seed: int, buffer: int) -> Iterator[Named]:
        """All rows, without end, in a shuffled order."""
        rng, sources = random.Random(f"{seed}/stream"), random.Random(f"{seed}/sources")
        readers = [self._endless(source) for source in self.sources]
        weights = [source.weight for source in self.sources]
        waiting = []
        while True:
            [reader] = sources.choices(readers, weights)
            waiting.append(next(reader))
            if len(waiting) > buffer:
                place = rng.randrange(buffer)
                waiting[place], waiting[-1] = waiting[-1], waiting[place]
                yield waiting.pop()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of the rows of each source."""
        return tuple(next(self._endless(source))[2] for source in self.sources)

    def noticed(self) -> Noticed:
        """What there is to say of the first rows of each source."""
        found = Noticed(self.wanted)
        for source in self.sources:
            for _ in islice(self._endless(source, found), PEEKED):
                pass
        return found

    def _endless(self, source: DataSource, noticed: Noticed | None = None) -> Iterator[Named]:
        noticed, shapes = noticed or Noticed(self.wanted), shapes_for(self.wanted)
        while True:
            found = None
            for file in source.files:
                rows = renamed(file.numbered(streaming=True), self.columns)
                good = checked(rows, file.name, True, shapes, source.several, noticed)
                for number, shape, row in good:
                    found = f"{file.name}: row {number}", row, shape
                    yield found
            if found is None:
                raise LorafoldError(f"{source.name}: no rows found, expected at least one")


def stream_of(
    sources: str | Sequence[str], columns: Mapping[str, str] | None = None, wanted: str = ""
) -> RowStream:
    """The stream of one or several sources, with columns and what is wanted as for `read_rows`."""
    named = [sources] if isinstance(sources, str) else sources
    stream = RowStream(tuple(map(source_from, named)), columns or {}, wanted)
    stream.noticed()
    return stream


@dataclass(eq=False)
class StreamFeed(BatchFeed):
    """The examples of rows that are read as they are needed; `batch` rows a step.

    rows: All rows without end, in the order of a seed, as `RowStream.rows` gives them.
    max_length: Longer examples are cut to this many tokens, at their end.
    batch: Rows of an optimizer step.
    steps: The number of optimizer steps.
    seed: The seed of the order.
    """

    rows: Callable[[int], Iterator[Named]]
    encoder: Encoder
    max_length: int
    batch: int
    steps: int
    seed: int
    foreseen = 50
    _read = _cut = _unlabelled = _marked = 0

    def after(self, step: int) -> Iterator[Sequence[Any]]:
        self._read = self._cut = self._unlabelled = self._marked = 0
        rows = islice(self.rows(self.seed), step * self.batch, None)
        for _ in range(step, self.steps):
            yield self._examples(rows, self.batch)

    def drawn(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        rows = self.rows(seed)
        for _ in range(n):
            yield self._examples(rows, size)

    @property
    def told(self) -> str:  # type: ignore[override]
        text = f"stream: {self._read:,} rows read"
        if self._cut:
            text += f"; {self._cut:,} were cut at {self.max_length} tokens"
        if self._unlabelled:
            text += f"; {self._unlabelled:,} have no token to train on"
        if self._marked:
            text += f"\n{self._marked} {MARKED}"
        return text

    def _examples(self, rows: Iterator[Named], n: int) -> Sequence[Any]:
        """The examples of the next n rows."""
        import pyarrow as pa

        chunk = list(islice(rows, n))
        takes = self.encoder.takes
        check_given((shape for *_, shape in chunk), takes)
        batch = self.encoder.encode([shape.given(takes, row) for _, row, shape in chunk], 0)
        for entry in batch.select(["row", "problem"]).to_pylist():
            if entry["problem"]:
                raise LorafoldError(f"{chunk[entry['row']][0]}: {entry['problem']}")
        table = pa.Table.from_batches([batch])
        examples = Examples(table, self.max_length)
        if not examples:
            raise LorafoldError(
                f"stream: none of {n} rows from {chunk[0][0]} on has a token to train on within"
                f" max_length {self.max_length}"
            )
        self._read += n
        self._cut += int((Lists(table.column("ids")).lengths > self.max_length).sum())
        self._unlabelled += n - len(set(examples.rows.tolist()))
        self._marked += examples.marked
        return examples
