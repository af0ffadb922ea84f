"""Streaming: rows are read during training, for data of any size.

Sources are sampled by weight and restart at their end. Rows pass through a shuffle buffer. Sampling
is seeded, so a resumed run skips the same rows.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from lorafold.data.arrow import Lists
from lorafold.data.batches import BatchFeed
from lorafold.data.control_tokens import ROWS_REMARK
from lorafold.data.examples import Examples
from lorafold.data.formats import RowFormat, formats_for
from lorafold.data.json_input import Row
from lorafold.data.row_sources import DataSource
from lorafold.data.rows import RowRemarks, check_each, check_provided
from lorafold.data.tokenizing import Encoder
from lorafold.errors import LorafoldError

NamedRow = tuple[str, Row, RowFormat]  # the name of a row in messages, the row, and its format
NUM_PEEKED = 100  # rows of each source that are checked before a run starts


@dataclass(frozen=True)
class RowStream:
    sources: tuple[DataSource, ...]
    content: str = ""

    @cached_property
    def identity(self) -> str:
        local = [s.identity if s.is_multiple or Path(s.name).exists() else "" for s in self.sources]
        return " ".join(f"{s} {of}".strip() for s, of in zip(self.sources, local, strict=True))

    @property
    def record(self) -> dict[str, Any]:
        return {"streamed": self.identity}

    def rows(self, seed: int, buffer: int) -> Iterator[NamedRow]:
        rng, sources = random.Random(f"{seed}/stream"), random.Random(f"{seed}/sources")
        readers = [self._endless(source) for source in self.sources]
        weights = [source.weight for source in self.sources]
        buffered = []
        while True:
            [reader] = sources.choices(readers, weights)
            buffered.append(next(reader))
            if len(buffered) > buffer:
                place = rng.randrange(buffer)
                buffered[place], buffered[-1] = buffered[-1], buffered[place]
                yield buffered.pop()

    @property
    def formats(self) -> tuple[RowFormat, ...]:
        return tuple(next(self._endless(source))[2] for source in self.sources)

    def remarks(self) -> RowRemarks:
        remarks = RowRemarks(self.content)
        for source in self.sources:
            for _ in islice(self._endless(source, remarks), NUM_PEEKED):
                pass
        return remarks

    def _endless(self, source: DataSource, remarks: RowRemarks | None = None) -> Iterator[NamedRow]:
        remarks, formats = remarks or RowRemarks(self.content), formats_for(self.content)
        while True:
            any_row = False
            for file in source.files:
                rows = file.numbered_rows(streaming=True)
                good = check_each(rows, file.name, True, formats, source.is_multiple, remarks)
                for number, row_format, row in good:
                    any_row = True
                    yield f"{file.name}: row {number}", row, row_format
            if not any_row:
                raise LorafoldError(f"{source.name}: no rows found, expected at least one")


@dataclass(eq=False)
class StreamFeed(BatchFeed):
    """Encodes rows on demand. `rows(seed)` yields rows endlessly."""

    rows: Callable[[int], Iterator[NamedRow]]
    encoder: Encoder
    max_length: int
    batch: int
    steps: int
    seed: int
    num_previewed = 50
    _counts: Counter[str] = field(default_factory=Counter)

    def after(self, step: int) -> Iterator[Sequence[Any]]:
        self._counts.clear()
        rows = islice(self.rows(self.seed), step * self.batch, None)
        return (self._examples(rows, self.batch) for _ in range(step, self.steps))

    def random_batches(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        rows = self.rows(seed)
        return (self._examples(rows, size) for _ in range(n))

    @property
    def summary(self) -> str:  # type: ignore[override]
        counts = {
            "cut": f"were cut at {self.max_length} tokens",
            "unlabelled": "have no token to train on",
        }
        parts = [f"{n:,} {what}" for name, what in counts.items() if (n := self._counts[name])]
        marked = f"\n{self._counts['marked']} {ROWS_REMARK}" if self._counts["marked"] else ""
        return "; ".join([f"stream: {self._counts['read']:,} rows read", *parts]) + marked

    def _examples(self, rows: Iterator[NamedRow], n: int) -> Sequence[Any]:
        import pyarrow as pa

        chunk, row_content = list(islice(rows, n)), self.encoder.row_content
        check_provided((row_format for *_, row_format in chunk), row_content)
        given = [row_format.extract(row_content, row) for _, row, row_format in chunk]
        batch = self.encoder.encode(given, 0)
        for entry in batch.select(["row", "problem"]).to_pylist():
            if entry["problem"]:
                raise LorafoldError(f"{chunk[entry['row']][0]}: {entry['problem']}")
        table = pa.Table.from_batches([batch])
        examples = Examples(table, self.max_length)
        if not examples:
            raise LorafoldError(
                f"stream: none of the {n} rows of a batch ({chunk[0][0]}, ...) has a token to train"
                f" on within max_length {self.max_length}; raise max_length, or remove these rows"
            )
        cut = int((Lists(table.column("ids")).lengths > self.max_length).sum())
        unlabelled = n - len(set(examples.rows.tolist()))
        self._counts.update(read=n, cut=cut, unlabelled=unlabelled, marked=examples.marked)
        return examples
