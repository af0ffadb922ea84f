"""Checked rows, stored in a list, or as JSON text in a memory-mapped Arrow file."""

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

CHUNK_ROWS = 1000  # rows of an Arrow record batch
AS_JSON = json.JSONEncoder(ensure_ascii=False, default=str)
AS_SORTED_JSON = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True)
MAX_IN_MEMORY = 16_000_000  # bytes; larger data is stored in Arrow files


class RowPlace(NamedTuple):
    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}" if self.file else f"row {self.row}"


def row_names(places: Iterable[RowPlace]) -> Iterator[str]:
    before = None
    for place in places:
        yield f"row {place.row}" if place.file == before else str(place)
        before = place.file


@dataclass(frozen=True)
class Origins:
    """The file and the number of each row, as runs of consecutive rows: (file, number of the first
    row, number of rows). A blank line starts a new run. Without runs, rows are numbered in order.
    `indices` (n,) are the selected rows.
    """

    runs: tuple[tuple[str, int, int], ...] = ()
    indices: Array | None = field(default=None, compare=False)

    def select(self, indices: Array) -> Origins:
        return replace(self, indices=indices if self.indices is None else self.indices[indices])

    def places(self, rows: Iterable[int]) -> list[RowPlace]:
        run, after = self._runs(np.fromiter(rows, np.int64))
        runs = self.runs or (("", 1, 0),)
        pairs = zip(run.tolist(), after.tolist(), strict=True)
        return [RowPlace(runs[n][0], runs[n][1] + at) for n, at in pairs]

    def files(self, n: int) -> tuple[list[str], Array]:
        """Returns the names of all files, and the index of each row's file (n,)."""
        if not self.runs:
            return [""], np.zeros(n, np.int64)
        numbers: dict[str, int] = {}
        of_run = [numbers.setdefault(name, len(numbers)) for name, *_ in self.runs]
        return [*numbers], np.array(of_run)[self._runs(np.arange(n))[0]]

    def _runs(self, rows: Array) -> tuple[Array, Array]:
        at = rows if self.indices is None else self.indices[rows]
        starts = np.cumsum([0, *(count for *_, count in self.runs)])
        run = np.searchsorted(starts, at, "right") - 1
        return run, at - starts[run]


@dataclass(frozen=True)
class SourcePart:
    """A source's number of rows, and how often an epoch uses each row on average (`weight`)."""

    size: int
    weight: float = 1.0


class ArrowRows(Items[Row]):
    """The rows of a file from `write_rows`, or only the rows at `indices` (n,)."""

    def __init__(self, path: Path, indices: Array | None = None) -> None:
        self._path, self._indices, self._text = path, indices, open_table(path).column("row")

    def __reduce__(self) -> tuple[type[ArrowRows], tuple[Any, ...]]:
        # another process maps the file again instead of receiving its rows
        return ArrowRows, (self._path, self._indices)

    def __len__(self) -> int:
        return len(self._text) if self._indices is None else len(self._indices)

    def item(self, index: int) -> Row:
        at = index if self._indices is None else int(self._indices[index])
        return json.loads(self._text[at].as_py())

    def __iter__(self) -> Iterator[Row]:
        return map(json.loads, self.texts())

    def texts(self) -> Iterator[str]:
        if self._indices is not None:
            yield from (self._text[int(i)].as_py() for i in self._indices)
            return
        for chunk in self._text.chunks:
            yield from chunk.to_pylist()

    def select(self, indices: Array) -> ArrowRows:
        return ArrowRows(self._path, indices if self._indices is None else self._indices[indices])


@dataclass(frozen=True)
class Rows(Items[Row]):
    """Checked rows. `ignored` are keys that their formats don't use, `known` is the digest and size
    of large data, `content` is the kind of data by which formats were chosen, `files` is the number
    of rows per file for sources with several files, and `read_as` is how they were read.
    """

    rows: Sequence[Row]
    parts: tuple[SourcePart, ...]
    ignored: tuple[str, ...] = ()
    known: tuple[str, int] | None = field(default=None, repr=False)
    content: str = ""
    remarks: tuple[str, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    origins: Origins = field(default_factory=Origins, repr=False)
    read_as: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(rows: Sequence[Row], content: str = "") -> Rows:
        if isinstance(rows, Rows):
            return rows
        return Rows(rows, (SourcePart(len(rows)),), content=content)

    def __getstate__(self) -> dict[str, Any]:
        # without the cached formats, whose functions can't be pickled
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
        return self.digest_and_size[0]

    @property
    def identity(self) -> str:
        """The digest, followed by weights if one of them is not 1."""
        if all(part.weight == 1 for part in self.parts):
            return self.digest_and_size[0]
        return f"{self.digest_and_size[0]} {' '.join(f'{p.size}*{p.weight:g}' for p in self.parts)}"

    @property
    def record(self) -> dict[str, Any]:
        record = {"rows": len(self.rows), "sha256": self.digest_and_size[0]}
        more = {"files": dict(self.files), **self.read_as}
        return record | {name: value for name, value in more.items() if value}

    @cached_property
    def digest_and_size(self) -> tuple[str, int]:
        """The SHA-256 and the number of bytes of the rows as JSON."""
        if self.known:
            return self.known
        digest, size = sha256(), 0
        for row in self.rows:
            text = AS_SORTED_JSON.encode(row).encode()
            digest.update(text)
            size += len(text)
        return digest.hexdigest(), size

    @cached_property
    def formats(self) -> tuple[RowFormat | None, ...]:
        starts = np.cumsum([0, *(part.size for part in self.parts)]).tolist()
        firsts = [self.rows[n] for n, p in zip(starts, self.parts, strict=False) if p.size]
        return tuple(format_of(row, formats_for(self.content)) for row in firsts)

    def provides(self, content: str) -> bool:
        return any(first is not None and content in first.provides for first in self.formats[:1])

    def extract(self, content: str, some: Sequence[Row] | None = None, first: int = 0) -> list[Any]:
        """Applies `RowFormat.extract` to all rows, or to the rows `some`, which start at index
        `first`.
        """
        rows = self.rows if some is None else some
        ends = np.cumsum([part.size for part in self.parts if part.size])
        source = np.searchsorted(ends, np.arange(first, first + len(rows)), "right").tolist()
        formats = [row_format for row_format in self.formats if row_format is not None]
        return [formats[n].extract(content, row) for n, row in zip(source, rows, strict=True)]

    def texts(self) -> Iterator[str]:
        return self.rows.texts() if isinstance(self.rows, ArrowRows) else map(AS_JSON.encode, self)

    def select(self, indices: Array) -> Rows:
        """Returns the rows at these indices, which must be ascending."""
        parts, origins = parts_of(indices, self.parts), self.origins.select(indices)
        of = replace(self, parts=parts, origins=origins)
        if not isinstance(self.rows, ArrowRows):
            return replace(of, rows=[self.rows[i] for i in indices])
        # the digest is derived from the indices, which avoids reading the rows again
        digest = sha256(self.sha256.encode() + indices.astype(np.int64).tobytes()).hexdigest()
        size = self.digest_and_size[1] * len(indices) // len(self.rows)
        return replace(of, rows=self.rows.select(indices), known=(digest, size))


def parts_of(rows: Array, parts: Sequence[SourcePart]) -> tuple[SourcePart, ...]:
    sizes = np.diff(np.searchsorted(rows, np.cumsum([0, *(part.size for part in parts)])))
    return tuple(SourcePart(int(n), p.weight) for n, p in zip(sizes, parts, strict=True))


def write_rows(rows: Iterable[Row], path: Path) -> tuple[str, int]:
    """Writes rows as JSON text to an Arrow file. Returns their digest and size, as
    `Rows.digest_and_size` does.
    """
    import pyarrow as pa

    schema, digest, size = pa.schema([("row", pa.large_string())]), sha256(), 0
    remaining = iter(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while chunk := list(islice(remaining, CHUNK_ROWS)):
            text = "".join(map(AS_SORTED_JSON.encode, chunk)).encode()
            digest.update(text)
            size += len(text)
            texts = pa.array(map(AS_JSON.encode, chunk), pa.large_string())
            writer.write_batch(pa.record_batch([texts], schema))
    return digest.hexdigest(), size
