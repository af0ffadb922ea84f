"""Reads rows from JSON lines, JSON, CSV, Parquet, Arrow and compressed text files.

An unreadable row is yielded as an error message, so that all bad rows can be reported together.
Rows are numbered from 1, by line in JSON lines and by record in CSV. Text is UTF-8, or UTF-16 with
a byte order mark. CSV is decoded as Windows-1252, with a warning, if this is plausible: the file is
ASCII up to the first byte that isn't UTF-8, and contains no control characters and no four
consecutive non-ASCII letters.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorafold.data.json_input import RowResult, check_row, decode, load_json, parse_row, suspicious
from lorafold.errors import LorafoldError
from lorafold.files.paths import nearest_name

if TYPE_CHECKING:
    import pyarrow as pa

Warn = Callable[[str], None]
Numbered = Iterator[tuple[int, RowResult]]
BOM = b"\xef\xbb\xbf"
TABLE_ROWS = 1000  # rows of a table converted to objects at a time
MAGIC = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
READ_BYTES = 1 << 16
WINDOWS = "cp1252"
UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CSV_HINT = "save as CSV in UTF-8, or run pandas.read_excel(FILE).to_csv('rows.csv', index=False)"
BAD_ENCODING = "neither UTF-8 nor Windows-1252; convert to UTF-8: iconv -f ENCODING -t utf-8 FILE"
# error messages by the first bytes of a file
PREFIXES = {
    b"PK\x03\x04": f"a spreadsheet or another zip file, expected rows; {CSV_HINT}",
    b"\xd0\xcf\x11\xe0": f"a spreadsheet, expected rows; {CSV_HINT}",
    b"%PDF": "a PDF, expected rows; save its text as JSON lines or CSV",
    b"\x1f\x8b": "gzip data, expected a file name that ends with .gz",
    b"BZh": "bzip2 data, expected a file name that ends with .bz2",
    b"\x28\xb5\x2f\xfd": "zstd data, expected a file name that ends with .zst",
    b"PAR1": "Parquet data, expected a file name that ends with .parquet",
    b"ARROW1": "Arrow data, expected a file name that ends with .arrow",
    b"version https://git-lfs": "a Git LFS pointer, expected rows; run git lfs pull",
    b"<!doctype": "a web page, expected rows; download the file itself",
    b"<html": "a web page, expected rows; download the file itself",
}
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
OTHER_ALPHABET = re.compile(r"[^\W\d_a-zA-Z]{4}")  # another alphabet, decoded as Windows-1252
LETTERS = re.compile(r"\w*[^\W\d_a-zA-Z]\w*")
WORD = re.compile(r"\w*[^\x00-\x7f]\w*")


class Unreadable(ValueError):
    """A problem with the whole file, as a one-line message."""


def as_utf8(file: io.BufferedReader, windows: bool, warn: Warn) -> io.BufferedReader:
    """Converts UTF-16 to UTF-8 and, with `windows`, also Windows-1252."""
    begins = file.peek(2)[:2]
    if not windows and begins not in UTF16_BOMS:
        return file
    return io.BufferedReader(_Utf8(_transcode(file, begins in UTF16_BOMS, warn)), READ_BYTES)


class _Utf8(io.RawIOBase):
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._ready = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        while not self._ready and (piece := next(self._pieces, None)) is not None:
            self._ready = piece
        count = min(len(into), len(self._ready))
        into[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _transcode(file: io.BufferedReader, wide: bool, warn: Warn) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8")()
    plain, windows = not wide, False  # plain: only ASCII so far
    piece = b" "
    while piece:
        piece = file.read1(READ_BYTES)
        if plain and piece.isascii():
            yield piece
            continue
        waiting = decoder.getstate()[0]
        try:
            text = _decode_windows(piece) if windows else decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            whole = waiting + piece
            if wide:
                raise Unreadable("has a UTF-16 BOM, but is not UTF-16; save it as UTF-8") from error
            if not (plain and whole[: error.start].isascii()):
                yield whole  # the parser of the row reports the bad bytes
                yield from iter(lambda: file.read1(READ_BYTES), b"")
                return
            windows, text = True, _decode_windows(whole)
            word = LETTERS.search(text) or WORD.search(text)
            warn(
                "not UTF-8, so the file is decoded as Windows-1252 (Excel's encoding of CSV), for"
                f" example {word and word[0]!r}; if this word is wrong, save the file as UTF-8"
            )
        plain = plain and text.isascii()
        yield text.encode()


def _decode_windows(piece: bytes) -> str:
    try:
        text = piece.decode(WINDOWS)
    except UnicodeDecodeError as error:
        raise Unreadable(BAD_ENCODING) from error
    if CONTROLS.search(text):
        raise Unreadable("not text; expected CSV in UTF-8, or in UTF-16 with a byte order mark")
    if OTHER_ALPHABET.search(text):
        raise Unreadable(BAD_ENCODING)
    return text


class FileFormat(NamedTuple):
    read: Callable[[io.BufferedReader], Numbered]
    compression: str | None


def file_format(path: Path) -> FileFormat | None:
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    if last in COMPRESSIONS and before in TEXT_READERS:
        return FileFormat(TEXT_READERS[before], COMPRESSIONS[last])
    return FileFormat(READERS[last], None) if last in READERS else None


def read_numbered(path: Path, warn: Warn) -> Numbered:
    kind = file_format(path)
    assert kind is not None
    try:
        with path.open("rb") as plain, _decompress(plain, kind.compression) as file:
            begins = file.peek(64)[:64]
            of_text, start = kind.read in TEXT_READERS.values(), begins.lstrip().lower()
            for sign, what in PREFIXES.items() if of_text or begins.startswith(b"version") else ():
                if start.startswith(sign.lower()):
                    raise Unreadable(f"found {what}")
            windows = kind.read in (TEXT_READERS[".csv"], TEXT_READERS[".tsv"])
            yield from kind.read(as_utf8(file, windows, warn) if of_text else file)
    except FileNotFoundError as error:
        several = "; to pass several files, repeat --data or pass a pattern" * ("," in path.name)
        hint = nearest_name(path) or several
        raise LorafoldError(f"{path}: there is no such file{hint}") from error
    except (OSError, ValueError, NotImplementedError) as error:
        known = isinstance(error, Unreadable)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        message = reason if known else f"can't be read: {reason}"
        raise LorafoldError(f"{path}: {message}") from error


def _decompress(file: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    if compression is None:
        return file
    import pyarrow as pa

    if (begins := file.peek(4)) and not begins.startswith(MAGIC[compression]):
        raise Unreadable(f"found no {compression} data; if the file is plain text, rename it")
    return io.BufferedReader(pa.CompressedInputStream(file, compression))


def _read_lines(lines: Iterable[bytes]) -> Numbered:
    """Reads one object per line. Raises Unreadable if the file contains a list, or an object over
    several lines.
    """
    bare = ((number, line.removeprefix(BOM)) for number, line in enumerate(lines, 1))
    filled = ((number, line) for number, line in bare if line.strip())
    begins = [*islice(filled, 2)]
    first = begins[0][1].strip() if begins else b""
    if first in (b"[", b"{") or (len(begins) == 1 and first.startswith(b"[")):
        what = "a list" if first.startswith(b"[") else "an object over several lines"
        raise Unreadable(f"found {what}, expected one object per line; rename the file to .json")
    for number, line in chain(begins, filled):
        yield number, parse_row(line)


def _read_json(file: io.BufferedReader) -> Numbered:
    first = file.readline().removeprefix(BOM)
    if first.lstrip()[:1] == b"{" and isinstance(parse_row(first), dict):
        yield from _read_lines(chain([first], file))
        return
    whole = first + file.read()
    try:
        text = decode(whole)
        value = load_json(text)
    except ValueError as error:
        if whole.lstrip()[:1] != b"[" and first.strip() != b"{":
            yield from _read_lines(io.BytesIO(whole))
            return
        raise Unreadable(str(error)) from error
    look = suspicious(text)
    for number, one in enumerate(value if isinstance(value, list) else [value], 1):
        yield number, check_row(one, look)


def _read_csv(file: io.BufferedReader, delimiter: str = "") -> Numbered:
    """Reads CSV. A column without a name is named after its number."""
    csv.field_size_limit(2**31 - 1)  # bytes
    last_line = 0  # the last line of the last good record
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        try:
            header = lines.readline()
            if separator := re.fullmatch(r"sep=(.)\s*", header):  # written by Excel
                delimiter, header = separator[1], lines.readline()
            # the most frequent one in the header outside of quotes; on a tie, the earlier one
            delimiter = delimiter or max(",;\t|", key=re.sub(r'"[^"]*"', "", header).count)
            records = csv.reader(chain([header], lines), strict=True, delimiter=delimiter)
            names = next(records, [])
            names = [name if name.strip() else f"column {n}" for n, name in enumerate(names, 1)]
            if repeated := [name for name, count in Counter(names).items() if count > 1]:
                found = ", ".join(map(repr, repeated))
                raise Unreadable(f"header: found {found} more than once, expected each name once")
            for number, values in enumerate(filter(None, records), 1):
                last_line, given = records.line_num, len(values)
                if not "".join(values).strip():
                    yield number, dict.fromkeys(names, "")
                elif given == len(names):
                    yield number, dict(zip(names, values, strict=True))
                else:
                    quotes = "; quote values that contain the delimiter" * (given > len(names))
                    found = f"found {given} values, expected {len(names)} as in the header"
                    yield number, f"{found}{quotes}"
        except UnicodeDecodeError as error:
            reason = f"invalid UTF-8 soon after line {last_line or 1}; save the whole file as UTF-8"
            raise Unreadable(reason) from error
        except csv.Error as error:
            what = str(error)
            reason = "a quote is not closed" if "unexpected end" in what else what
            raise Unreadable(f"not CSV after line {last_line or 1}: {reason}") from error


def _read_parquet(file: io.BufferedReader) -> Numbered:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        yield from _read_batches(table.iter_batches(TABLE_ROWS))


def _read_arrow(file: io.BufferedReader) -> Numbered:
    import pyarrow as pa

    try:
        batches = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        yield from _read_batches(pa.ipc.open_stream(file))
        return
    yield from _read_batches(batches.get_batch(n) for n in range(batches.num_record_batches))


def _read_batches(batches: Iterable[pa.RecordBatch]) -> Numbered:
    few = (b.slice(at, TABLE_ROWS) for b in batches for at in range(0, len(b), TABLE_ROWS))
    return enumerate((row for batch in few for row in batch.to_pylist()), 1)


TEXT_READERS: dict[str, Callable[[io.BufferedReader], Numbered]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
}
READERS = TEXT_READERS | {".parquet": _read_parquet, ".arrow": _read_arrow}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
SUPPORTED = f"{', '.join(READERS)} (text also as .gz, .bz2 or .zst)"
