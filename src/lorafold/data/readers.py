"""Reads the rows of a file: JSON lines, JSON, CSV, Parquet, Arrow, and those of text compressed.

    numbered(Path("rows.jsonl.gz"))     (1, row), (2, row), ...

A row that can't be read is handed on as the reason, so that all bad rows are told together. Rows
are numbered from 1: by line in a file of JSON lines, by record after the header in a CSV file.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafold.data.parsing import Found, as_row, decoded, loaded, row_of, suspect
from lorafold.errors import LorafoldError

if TYPE_CHECKING:
    import pyarrow as pa

Numbered = Iterator[tuple[int, Found]]
BOM = b"\xef\xbb\xbf"
WIDE = (b"\xff\xfe", b"\xfe\xff")  # what UTF-16 begins with
ZIPPED = b"PK\x03\x04"  # what a spreadsheet begins with
DELIMITERS = ",;\t|"
AT_ONCE = 1000  # rows of a table that are made into objects together
AS_CSV = "save it as CSV in UTF-8, or: pandas.read_excel(FILE).to_csv('rows.csv', index=False)"
AS_UTF8 = "save the file as UTF-8; one of Windows: iconv -f windows-1252 -t utf-8 FILE > rows.csv"
LONGEST = 2**31 - 1  # bytes of a field of CSV


class Kind(NamedTuple):
    """How a file is read, and pyarrow's name of its compression."""

    read: Callable[[io.BufferedReader], Numbered]
    compression: str | None


def kind_of_file(path: Path) -> Kind | None:
    """What reads the file, by the end of its name; None for a file of no such kind."""
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    if last in COMPRESSED and before in TEXT:
        return Kind(TEXT[before], COMPRESSED[last])
    return Kind(READERS[last], None) if last in READERS else None


def numbered(path: Path) -> Numbered:
    """The numbered rows of a file of a kind that is known, unchecked.

    Raises LorafoldError where the file can't be read.
    """
    kind = kind_of_file(path)
    assert kind is not None
    try:
        with path.open("rb") as plain, _expanded(plain, kind.compression) as file:
            yield from kind.read(file)
    except (OSError, ValueError, NotImplementedError) as error:
        known = isinstance(error, Unreadable)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        told = reason if known else f"can't be read: {reason}"
        raise LorafoldError(f"{path}: {told}") from error


class Unreadable(ValueError):
    """What is wrong with a file as a whole, in one line."""


def _expanded(file: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    if compression is None:
        return file
    import pyarrow as pa

    stream: Any = pa.CompressedInputStream(file, compression)
    return io.BufferedReader(stream)


def _lines(lines: Iterable[bytes]) -> Numbered:
    """One object a line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, row_of(line.removeprefix(BOM))


def _json(file: io.BufferedReader) -> Numbered:
    """One list of objects, one object, or objects one a line."""
    first = file.readline().removeprefix(BOM)
    if first.lstrip()[:1] == b"{" and isinstance(row_of(first), dict):
        yield from _lines(chain([first], file))
        return
    whole = first + file.read()
    try:
        text = decoded(whole)
        value = loaded(text)
    except ValueError as error:
        if whole.lstrip()[:1] != b"[" and first.strip() != b"{":
            yield from _lines(io.BytesIO(whole))
            return
        raise Unreadable(str(error)) from error
    look = suspect(text)
    for number, one in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, as_row(one, look)


def _csv(file: io.BufferedReader, delimiter: str = "") -> Numbered:
    """Rows under the names of the header; every value is text. A column without a name, such as
    the index that pandas writes, is called by its place: column 1.
    """
    csv.field_size_limit(LONGEST)
    last = 0  # the line with which the last good record ends
    begins = file.peek(4)[:64]
    if begins.startswith(ZIPPED):
        raise Unreadable(f"found a spreadsheet, expected CSV; {AS_CSV}")
    encoding = "utf-16" if begins.startswith(WIDE) else "utf-8-sig"
    with io.TextIOWrapper(file, encoding, newline="") as lines:
        try:
            header = lines.readline()
            if told := re.fullmatch(r"sep=(.)\s*", header):  # as Excel begins such a file
                delimiter, header = told[1], lines.readline()
            records = csv.reader(
                chain([header], lines), strict=True, delimiter=delimiter or _delimiter(header)
            )
            names = next(records, [])
            names = [name if name.strip() else f"column {n}" for n, name in enumerate(names, 1)]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                found = ", ".join(map(repr, twice))
                raise Unreadable(f"header: found {found} more than once, expected each name once")
            for number, values in enumerate(filter(None, records), 1):
                last, given = records.line_num, len(values)
                if given == len(names):
                    yield number, dict(zip(names, values, strict=True))
                else:
                    yield number, f"found {given} values, expected {len(names)} as in the header"
        except UnicodeDecodeError as error:
            near = f"not UTF-8 soon after line {last or 1}; {AS_UTF8}"
            if b"\0" in begins:
                near = "not text; expected CSV in UTF-8, or in UTF-16 with its byte order mark"
            raise Unreadable(near) from error
        except csv.Error as error:
            raise Unreadable(f"not CSV after line {last or 1}: {error}") from error


def _delimiter(header: str) -> str:
    """What divides the fields: of comma, semicolon, tab and bar the one that the header has most
    often outside of quotes, the earlier of equals.
    """
    bare = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=bare.count)


def _tsv(file: io.BufferedReader) -> Numbered:
    return _csv(file, "\t")


def _parquet(file: io.BufferedReader) -> Numbered:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as found:
        yield from _rows(found.iter_batches(AT_ONCE))


def _arrow(file: io.BufferedReader) -> Numbered:
    """A file of Arrow, or a stream of it, as `datasets` writes them."""
    import pyarrow as pa

    try:
        found = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        yield from _rows(pa.ipc.open_stream(file))
        return
    yield from _rows(found.get_batch(n) for n in range(found.num_record_batches))


def _rows(batches: "Iterable[pa.RecordBatch]") -> Numbered:
    few = (b.slice(at, AT_ONCE) for b in batches for at in range(0, len(b), AT_ONCE))
    return enumerate((row for batch in few for row in batch.to_pylist()), 1)


TEXT: dict[str, Callable[[io.BufferedReader], Numbered]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
}
READERS = TEXT | {".parquet": _parquet, ".arrow": _arrow}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
KINDS = f"{', '.join(READERS)} (text also as .gz, .bz2 or .zst)"
