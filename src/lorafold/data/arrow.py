"""Tables of tokens and labels in memory-mapped Arrow files."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

TURNS = "turns"
E = TypeVar("E")
Array = np.ndarray[Any, np.dtype[Any]]


def open_table(path: Path) -> "pa.Table":
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def to_batch(
    entries: Sequence[Mapping[str, Any]],
    integers: Iterable[str] = (),
    lists: Iterable[str] = (),
    flags: Iterable[str] = (),
    texts: Iterable[str] = (),
) -> "pa.RecordBatch":
    """Builds a record batch of int32 columns, int32 lists, booleans and strings. It avoids
    `pa.array`, which would import pandas (0.4 s).
    """
    import pyarrow as pa

    def int32(values: Any) -> Any:
        data = np.asarray(values, np.int32)
        return pa.Array.from_buffers(pa.int32(), len(data), [None, pa.py_buffer(data)])

    columns = {name: int32([entry[name] for entry in entries]) for name in integers}
    for name in lists:
        lists_of_rows = [np.asarray(entry[name], np.int32) for entry in entries]
        ends = np.cumsum([0, *map(len, lists_of_rows)])
        flat = np.concatenate([np.zeros(0, np.int32), *lists_of_rows])
        columns[name] = pa.ListArray.from_arrays(int32(ends), int32(flat))
    for name in flags:
        columns[name] = int32([entry[name] for entry in entries]).cast(pa.bool_())
    for name in texts:
        encoded = [entry[name].encode() for entry in entries]
        ends = np.cumsum([0, *map(len, encoded)])
        buffers = [None, int32(ends).buffers()[1], pa.py_buffer(b"".join(encoded))]
        columns[name] = pa.Array.from_buffers(pa.string(), len(encoded), buffers)
    return pa.record_batch(columns)


def column(table: "pa.Table", name: str) -> Array:
    """Returns an int32 column as an array (n,). It avoids `to_numpy`, which would import pandas."""
    return np.concatenate([np.zeros(0, np.int32), *map(np.from_dlpack, table.column(name).chunks)])


class Lists:
    """A column of int32 lists. Its items are views (T,) of the memory-mapped file."""

    def __init__(self, column: "pa.ChunkedArray") -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.ends = [np.from_dlpack(chunk.offsets) for chunk in chunks]  # (n + 1,) each
        self.values = [np.from_dlpack(chunk.values) for chunk in chunks]
        self.lengths: Array = np.concatenate([np.zeros(0, np.int32), *map(np.diff, self.ends)])
        self._first = np.cumsum([0, *map(len, chunks)])

    def __iter__(self) -> Iterator[Array]:  # (T,) each
        for ends, values in zip(self.ends, self.values, strict=True):
            for start, end in pairwise(ends.tolist()):
                yield values[start:end]

    def __getitem__(self, index: int) -> Array:  # (T,)
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        at = index - self._first[chunk]
        return self.values[chunk][self.ends[chunk][at] : self.ends[chunk][at + 1]]


def hash_rows(*columns: Iterable[Any]) -> Array:
    """Hashes each row across columns (n,). Hashes are comparable only within this process."""
    plain = (map(np.ndarray.tobytes, c) if isinstance(c, Lists) else c for c in columns)
    return np.fromiter(map(hash, zip(*plain, strict=True)), np.int64)


class Judgements(NamedTuple):
    """Digests of the judged inputs (n,), their verdicts (n,), the message for contradictory
    verdicts, and the number of examples per label.
    """

    subjects: Array
    verdicts: Array
    contradiction: str
    labels: Mapping[str, int] = {}


class Items(Sequence[E]):
    @abstractmethod
    def item(self, index: int) -> E:
        """Returns the item at a non-negative index."""

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> list[E]: ...
    def __getitem__(self, index: int | slice) -> E | list[E]:
        at = range(len(self))[index]
        return self.item(at) if isinstance(at, int) else list(map(self.item, at))


class TableExamples(Items[E]):
    """Examples in a table, truncated to `max_length`. `lengths` (n,) are in tokens, and `rows` (n,)
    are row indices.

    `marked` is the number of rows that contain control tokens as text. Two rows are duplicates if
    their examples agree in `compared_by`, the columns of untruncated tokens and trained spans.
    """

    compared_by: tuple[Iterable[Any], ...]
    judgements: Judgements | None = None  # only for labels and preferences
    ends_lost: Array | None = None  # (n,), whether truncation removes the end of an answer

    def __init__(self, table: "pa.Table", max_length: int, indices: Array) -> None:
        self._ids = Lists(table.column("ids"))
        self.indices, self._max_length = indices, max_length
        self.lengths = np.minimum(self._ids.lengths[indices], max_length)
        self.rows = column(table, "row")[indices]
        self.marked, self.table = 0, table
        if "marked" in table.column_names:
            self.marked = len(np.unique(column(table.filter(table.column("marked")), "row")))

    def __len__(self) -> int:
        return len(self.indices)


def lengths_of(examples: Sequence[Any]) -> list[int]:
    if isinstance(examples, TableExamples):
        return list(map(int, examples.lengths))
    return [len(example.ids) for example in examples]
