"""Lists of numbers in Arrow files, memory-mapped: what a row's tokens are kept in.

    table = open_table(path);  ids = Lists(table.column("ids"));  ids[3]  ->  an array (T,)

Nothing is copied and no Python object is made for a token until an example is asked for.
"""

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
    """The table of an Arrow file, memory-mapped."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def numbers(values: Sequence[int] | Array) -> "pa.Int32Array":
    """An Arrow array of int32 (n,). `pa.array` would import pandas, which takes 0.4 s."""
    import pyarrow as pa

    flat = np.asarray(values, np.int32)
    return pa.Array.from_buffers(pa.int32(), len(flat), [None, pa.py_buffer(flat)])


def flags(values: Sequence[bool]) -> "pa.BooleanArray":
    """An Arrow array of booleans (n,), made as `numbers` makes one."""
    import pyarrow as pa

    bits = np.packbits(np.asarray(values, bool), bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def texts(values: Sequence[str]) -> "pa.StringArray":
    """An Arrow array of texts (n,), made as `numbers` makes one."""
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(encoded), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))
    )


def lists(values: Sequence[Sequence[int]]) -> "pa.ListArray":
    """An Arrow array of lists of int32."""
    import pyarrow as pa

    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.empty(ends[-1], np.int32)
    for start, end, entries in zip(ends[:-1], ends[1:], values, strict=True):
        flat[start:end] = entries
    return pa.ListArray.from_arrays(numbers(ends), numbers(flat))


def column(table: "pa.Table", name: str) -> Array:
    """A column of int32 as one array (n,). `to_numpy` would import pandas too."""
    return np.concatenate([np.zeros(0, np.int32), *map(np.from_dlpack, table.column(name).chunks)])


def count_marked(table: "pa.Table") -> int:
    """How many rows of a table of examples are `marked`, if it says so of any."""
    import pyarrow.compute as pc

    if "marked" not in table.column_names:
        return 0
    return int(pc.count_distinct(table.filter(table.column("marked")).column("row")).as_py())


class Lists:
    """A column of lists of int32, as arrays over the file's own bytes."""

    def __init__(self, column: "pa.ChunkedArray") -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.ends = [np.from_dlpack(chunk.offsets) for chunk in chunks]  # of each chunk, (n + 1,)
        self.values = [np.from_dlpack(chunk.values) for chunk in chunks]
        self._first = np.cumsum([0, *map(len, chunks)])

    @property
    def lengths(self) -> Array:
        """The length of each list, (n,)."""
        return np.concatenate([np.zeros(0, np.int32), *map(np.diff, self.ends)])

    @property
    def lasts(self) -> Array:
        """The last number of each list, (n,); 0 for an empty one."""
        found = [np.zeros(0, np.int32)]
        for ends, values in zip(self.ends, self.values, strict=True):
            last = np.append(values, np.int32(0))[ends[1:] - 1]
            found.append(np.where(np.diff(ends) > 0, last, 0))
        return np.concatenate(found)

    def __iter__(self) -> Iterator[Array]:  # (T,) each
        for ends, values in zip(self.ends, self.values, strict=True):
            for start, end in pairwise(ends.tolist()):
                yield values[start:end]

    def __getitem__(self, index: int) -> Array:  # (T,)
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        at = index - self._first[chunk]
        return self.values[chunk][self.ends[chunk][at] : self.ends[chunk][at + 1]]


def digests(*columns: Iterable[Any]) -> Array:
    """A number for each entry of columns of lists, texts, bytes or numbers, (n,), as this process
    has it: the same for equal ones, and for two others with a chance of about 2^-64.
    """
    plain = (map(np.ndarray.tobytes, c) if isinstance(c, Lists) else c for c in columns)
    return np.fromiter(map(hash, zip(*plain, strict=True)), np.int64)


class Judged(NamedTuple):
    """What examples judge and how: a digest of each subject (n,), and the number of a verdict on it
    (n,). `contrary` says in words that a row judges a subject otherwise than another does.
    """

    subjects: Array
    verdicts: Array
    contrary: str


class TableExamples(Sequence[E]):
    """Abstract: examples of a table, each made when it is asked for.

    `lengths` (n,) are the tokens of each, after cutting, and `rows` (n,) the index of its row.
    `marked` rows of the table have control tokens that are text.
    """

    def __init__(self, table: "pa.Table", max_length: int, chosen: Array) -> None:
        """Take the examples with the indices `chosen`, cut to `max_length` tokens at their end."""
        self._ids, self._chosen, self._max_length = Lists(table.column("ids")), chosen, max_length
        self.lengths = np.minimum(self._ids.lengths[chosen], max_length)
        self.rows = column(table, "row")[chosen]
        self.marked = count_marked(table)
        self._table = table

    @abstractmethod
    def digests(self) -> Array:
        """A digest of each example, (n,): of its tokens before cutting, and of what is trained."""

    def ends_lost(self) -> Array | None:
        """Whether the end of an answer is cut off each example, (n,); None where there is none."""
        return None

    def turns(self) -> Iterator[tuple[int, str]]:
        """(index of a row, its messages as `data.completions` has them in the column `turns`)."""
        if TURNS in self._table.column_names:
            chunks = self._table.column(TURNS).chunks
            found = (text for chunk in chunks for text in chunk.to_pylist())
            rows = column(self._table, "row").tolist()
            yield from ((row, text) for row, text in zip(rows, found, strict=True) if text)

    def judged(self) -> Judged | None:
        """What the examples judge; None where they judge nothing."""
        return None

    def labels(self) -> Mapping[str, int]:
        """How many examples have each of the labels that there may be."""
        return {}

    @abstractmethod
    def _example(self, entry: int) -> E:
        """The example of one entry of the table."""

    def _cut(self, entry: int) -> tuple[int, ...]:
        """The ids of one entry of the table, cut to the longest length."""
        return tuple(self._ids[entry][: self._max_length].tolist())

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> E: ...
    @overload
    def __getitem__(self, index: slice) -> list[E]: ...
    def __getitem__(self, index: int | slice) -> E | list[E]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._example(int(self._chosen[index]))


def lengths_of(examples: Sequence[Any]) -> list[int]:
    """The tokens of each example; no example of a table is made for it."""
    if isinstance(examples, TableExamples):
        lengths: list[int] = examples.lengths.tolist()
        return lengths
    return [len(example.ids) for example in examples]
