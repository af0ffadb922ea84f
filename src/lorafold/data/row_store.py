"""A user's rows after they are checked: in a list, or as JSON text in a memory-mapped Arrow file.

    rows.origins.places([0, 17])      [RowPlace("a.jsonl", 1), RowPlace("b.jsonl", 5)]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorafold.data.arrow import Array, Items, open_table
from lorafold.data.formats import RowFormat, format_of, formats_for
from lorafold.data.json_input import Row

CHUNK = 1000  # rows of an Arrow record batch
AS_IT_IS = json.JSONEncoder(ensure_ascii=False, default=str)
SORTED = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True)
LARGE = 16_000_000  # bytes of rows or of a file, from which on they are kept in Arrow files


class RowPlace(NamedTuple):
    """A row: the name of its file, empty for rows given in Python, and its number there, from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}" if self.file else f"row {self.row}"


def named(places: Iterable[RowPlace]) -> Iterator[str]:
    """How places are called one after another: the file of the one before is not named again."""
    before = None
    for place in places:
        yield f"row {place.row}" if place.file == before else str(place)
        before = place.file


@dataclass(frozen=True)
class Origins:
    """Where each row is from. `runs` are the name of a file, the number of a row in it, and how
    many rows follow one another from there on, one for most files and one more after each blank
    line; rows without any are numbered as they come. `chosen` are the indices of the rows that were
    selected of all, (n,).
    """

    runs: tuple[tuple[str, int, int], ...] = ()
    chosen: Array | None = field(default=None, compare=False)

    def select(self, indices: Array) -> Origins:
        """Those of the rows with these indices."""
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def places(self, rows: Iterable[int]) -> list[RowPlace]:
        """The places of the rows with these indices."""
        run, after = self._runs(np.fromiter(rows, np.int64))
        runs = self.runs or (("", 1, 0),)
        pairs = zip(run.tolist(), after.tolist(), strict=True)
        return [RowPlace(runs[n][0], runs[n][1] + at) for n, at in pairs]

    def files(self, n: int) -> tuple[list[str], Array]:
        """The names of the files, and the number of that which each of n rows is from, (n,)."""
        if not self.runs:
            return [""], np.zeros(n, np.int64)
        numbers: dict[str, int] = {}
        of_run = [numbers.setdefault(name, len(numbers)) for name, *_ in self.runs]
        return [*numbers], np.array(of_run)[self._runs(np.arange(n))[0]]

    def _runs(self, rows: Array) -> tuple[Array, Array]:
        """The number of the run of each of some rows, and how far it is after its beginning."""
        at = rows if self.chosen is None else self.chosen[rows]
        starts = np.cumsum([0, *(count for *_, count in self.runs)])
        run = np.searchsorted(starts, at, "right") - 1
        return run, at - starts[run]


@dataclass(frozen=True)
class SourcePart:
    """How many rows are from one source, and how often an epoch goes through them."""

    size: int
    weight: float = 1.0


class ArrowRows(Items[Row]):
    """The rows of a file that `write_rows` wrote: all, or those with the indices `chosen` (n,)."""

    def __init__(self, path: Path, chosen: Array | None = None) -> None:
        self._path, self._chosen, self._text = path, chosen, open_table(path).column("row")

    def __reduce__(self) -> tuple[type[ArrowRows], tuple[Any, ...]]:
        # another process opens the file itself
        return ArrowRows, (self._path, self._chosen)

    def __len__(self) -> int:
        return len(self._text) if self._chosen is None else len(self._chosen)

    def item(self, index: int) -> Row:
        at = index if self._chosen is None else int(self._chosen[index])
        return json.loads(self._text[at].as_py())

    def __iter__(self) -> Iterator[Row]:
        return map(json.loads, self.texts())

    def texts(self) -> Iterator[str]:
        """The rows as JSON text."""
        if self._chosen is not None:
            yield from (self._text[int(i)].as_py() for i in self._chosen)
            return
        for chunk in self._text.chunks:
            yield from chunk.to_pylist()

    def select(self, indices: Array) -> ArrowRows:
        """The rows with these indices."""
        return ArrowRows(self._path, indices if self._chosen is None else self._chosen[indices])


@dataclass(frozen=True)
class Rows(Items[Row]):
    """Checked rows. `ignored` are their keys that no format has, in the order of appearance, and
    `known` is the digest and the bytes of large rows. `wanted` chose their formats,
    `remarks` are lines on them, `files` has the rows of each file of a source that is made of
    several, and `origins` says where each is from.
    """

    rows: Sequence[Row]
    parts: tuple[SourcePart, ...]
    ignored: tuple[str, ...] = ()
    known: tuple[str, int] | None = field(default=None, repr=False)
    wanted: str = ""
    remarks: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    origins: Origins = field(default_factory=Origins, repr=False)

    @staticmethod
    def of(rows: Sequence[Row], wanted: str = "") -> Rows:
        """Rows of one source; those that are `Rows` already stay as they are."""
        if isinstance(rows, Rows):
            return rows
        return Rows(rows, (SourcePart(len(rows)),), wanted=wanted)

    def __getstate__(self) -> dict[str, Any]:
        # another process finds their formats again, which have functions that can't be sent
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> Row:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @property
    def sha256(self) -> str:
        """The SHA-256 of the rows as JSON, so the same rows have one digest in every format."""
        return self.measured[0]

    @property
    def identity(self) -> str:
        """The digest, with the weights of the sources where an epoch does not take all rows once.
        """
        if all(part.weight == 1 for part in self.parts):
            return self.measured[0]
        return f"{self.measured[0]} {' '.join(f'{p.size}*{p.weight:g}' for p in self.parts)}"

    @property
    def record(self) -> dict[str, Any]:
        """What an adapter's record says of them."""
        record = {"rows": len(self.rows), "sha256": self.measured[0]}
        return record | ({"files": dict(self.files)} if self.files else {})

    @cached_property
    def measured(self) -> tuple[str, int]:
        """The digest of the rows, and their size as JSON in bytes."""
        if self.known:
            return self.known
        digest, size = sha256(), 0
        for row in self.rows:
            text = SORTED.encode(row).encode()
            digest.update(text)
            size += len(text)
        return digest.hexdigest(), size

    @cached_property
    def formats(self) -> tuple[RowFormat | None, ...]:
        """The format of the rows of each source that has any; None for those of none."""
        starts = np.cumsum([0, *(part.size for part in self.parts)]).tolist()
        firsts = [self.rows[n] for n, p in zip(starts, self.parts, strict=False) if p.size]
        return tuple(format_of(row, formats_for(self.wanted)) for row in firsts)

    def provides(self, what: str) -> bool:
        """Whether the rows of the first source give this, a key of `RowFormat.gives`."""
        return any(first is not None and what in first.provides for first in self.formats[:1])

    def extract(self, what: str, some: Sequence[Row] | None = None, first: int = 0) -> list[Any]:
        """As `RowFormat.extract`, of all rows or of `some`, whose first has the index `first`."""
        rows = self.rows if some is None else some
        ends = np.cumsum([part.size for part in self.parts if part.size])
        source = np.searchsorted(ends, np.arange(first, first + len(rows)), "right").tolist()
        formats = [row_format for row_format in self.formats if row_format is not None]
        return [formats[n].extract(what, row) for n, row in zip(source, rows, strict=True)]

    def texts(self) -> Iterator[str]:
        """The rows as JSON text."""
        return self.rows.texts() if isinstance(self.rows, ArrowRows) else map(AS_IT_IS.encode, self)

    def select(self, indices: Array) -> Rows:
        """The rows with these indices, which ascend."""
        parts, origins = parts_of(indices, self.parts), self.origins.select(indices)
        of = replace(self, parts=parts, origins=origins)
        if not isinstance(self.rows, ArrowRows):
            return replace(of, rows=[self.rows[i] for i in indices])
        # the rows themselves are not read again for the digest of some of them
        digest = sha256(self.sha256.encode() + indices.astype(np.int64).tobytes()).hexdigest()
        size = self.measured[1] * len(indices) // len(self.rows)
        return replace(of, rows=self.rows.select(indices), known=(digest, size))


def parts_of(rows: Array, parts: Sequence[SourcePart]) -> tuple[SourcePart, ...]:
    """How many of some rows, or of examples made of them, are from each source."""
    sizes = np.diff(np.searchsorted(rows, np.cumsum([0, *(part.size for part in parts)])))
    return tuple(SourcePart(int(n), p.weight) for n, p in zip(sizes, parts, strict=True))


def write_rows(rows: Iterable[Row], path: Path) -> tuple[str, int]:
    """Write rows to an Arrow file as JSON text; return what they are `measured`."""
    import pyarrow as pa

    schema, digest, size = pa.schema([("row", pa.large_string())]), sha256(), 0
    remaining = iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while chunk := list(islice(remaining, CHUNK)):
            text = "".join(map(SORTED.encode, chunk)).encode()
            digest.update(text)
            size += len(text)
            texts = pa.array(map(AS_IT_IS.encode, chunk), pa.large_string())
            writer.write_batch(pa.record_batch([texts], schema))
    return digest.hexdigest(), size
