"""Reads rows from JSON lines, JSON, CSV, workbooks, chats, Parquet, Arrow, and compressed files.

An unreadable row is yielded as an error message, so that all bad rows can be reported together.
Rows are numbered from 1, by line in JSON lines and by record in tables. Text is UTF-8, or UTF-16
with a byte order mark, or has the encoding that the user names. CSV is decoded as Windows-1252,
with a warning, if its words are plausible then; other encodings are only suggested.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorafold.data.exports import Numbered, cut_chats, read_whatsapp
from lorafold.data.json_input import Unreadable, check_row, decode, load_json, parse_row, suspicious
from lorafold.errors import LorafoldError, listed
from lorafold.files.paths import nearest_name

if TYPE_CHECKING:
    import pyarrow as pa

Warn = Callable[[str], None]
Reader = Callable[[io.BufferedReader, Warn], Numbered]
BOM = b"\xef\xbb\xbf"
TABLE_ROWS = 1000  # rows of a table converted to objects at a time
MAGIC = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
READ_BYTES = 1 << 16
WINDOWS = "cp1252"
READ_ERRORS = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
)
UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CSV_HINT = "save as .xlsx or as CSV in UTF-8"
ENCODINGS = (  # suggested if they are plausible
    *("mac_roman", "cp850", "cp1250", "cp1251", "koi8_r"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
# error messages by the first bytes of a file
PREFIXES = {
    b"PK\x03\x04": "a workbook or another zip file, expected a name that ends with .xlsx or .zip",
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
WORD = re.compile(r"[^\W\d_]*[^\x00-\x7f]+[^\W\d_]*")
QUOTES = "„“”‚‘’«»‹›–—…¿¡€£§°\xa0\xad"
# another alphabet, or the encoding of a Mac or of Central Europe, read as Windows-1252
NOT_WINDOWS = re.compile(r"[^\W\d_a-zA-Z]{4}|[ŠŽšžŸƒˆ]|œ(?![ucdis])")
MIXED = re.compile(r"[a-zA-Z][Ѐ-\u1fff⺀-\uffff]|[Ѐ-\u1fff⺀-\uffff][a-zA-Z]")  # two alphabets
MAX_PARSED = 1 << 24  # bytes of JSON that are parsed at once
MAX_OBJECT = 1 << 30
TOO_LARGE = "a JSON object of over 1 GB needs 8 GB of memory or more; export fewer chats at a time"
EXPORT = re.compile(r"(^|/)(conversations(-\d+)?|result)\.json$")  # the chats of an export
HEADER_ROWS = 5  # the header of a table is one of its first rows
SEPARATOR = re.compile(r"[\s,]*")
ONE_COLUMN = {"text", "prompt", "messages", "conversations"}  # headers of tables with one column


def as_utf8(file: io.BufferedReader, encoding: str, warn: Warn) -> io.BufferedReader:
    """Converts `encoding`, or else Windows-1252 if it is not UTF-8, to UTF-8."""
    import pyarrow as pa

    convert = _transcoder(encoding, warn)
    stream = pa.TransformInputStream(pa.PythonFile(file, "r"), lambda data: convert(bytes(data)))
    return io.BufferedReader(stream, READ_BYTES)


def _transcoder(encoding: str, warn: Warn) -> Callable[[bytes], bytes]:
    decoder: Any = codecs.getincrementaldecoder(encoding or "utf-8")()
    plain = not encoding  # only ASCII so far

    def transcode(piece: bytes) -> bytes:
        nonlocal decoder, encoding, plain
        if decoder is None:
            return piece
        whole = decoder.getstate()[0] + piece
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            if encoding:
                begin = "has a UTF-16 BOM, but " * (encoding == "utf-16")
                raise Unreadable(f"{begin}is not {encoding.upper()}; save it as UTF-8") from error
            if not (plain and whole[: error.start].isascii()):
                decoder = None
                return whole  # the parser of the row reports the bad bytes
            encoding, decoder = WINDOWS, codecs.getincrementaldecoder(WINDOWS)()
            word, text = _example_of_windows(whole), decoder.decode(whole)
            warn(
                "not UTF-8, so the file is decoded as Windows-1252 (Excel's encoding of CSV), for"
                f" example {word!r}; if this word is wrong, save the file as UTF-8, or pass"
                " --encoding"
            )
        plain = plain and text.isascii()
        return str(text).encode()

    return transcode


def _example_of_windows(piece: bytes) -> str:
    """Returns a word in Windows-1252. Raises an error if other encodings are more plausible."""
    if CONTROLS.search(piece.decode("latin-1")):
        raise Unreadable("not text; expected CSV in UTF-8, or in UTF-16 with a byte order mark")
    choices: dict[str, str] = {}
    for name in (WINDOWS, *ENCODINGS):
        text = codecs.getincrementaldecoder(name)("replace").decode(piece)
        words = [word for found in WORD.findall(text) if (word := found.strip(QUOTES))]
        good = [
            word
            for word in words
            if word in (word.lower(), word.upper(), word.capitalize())
            and all(one.isalpha() or one in QUOTES or "⺀" < one < "\ufff0" for one in word)
            and not (MIXED if name in ENCODINGS else NOT_WINDOWS).search(word)
        ]
        if len(good) >= 0.9 * len(words):  # most words are plausible
            word = next((word for word in good if not word.isascii()), text.strip()[-20:])
            if name == WINDOWS:
                return word
            choices.setdefault(word, f"--encoding {name} if it contains {word!r}")
    expected = ", ".join(choices.values()) or "--encoding NAME, or save it as UTF-8"
    raise Unreadable(f"neither UTF-8 nor Windows-1252; pass {expected}")


def file_format(path: Path) -> tuple[Reader, str | None] | None:
    """Returns the reader and the compression of a file, by its name."""
    *_, before, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    if last in COMPRESSIONS and before in TEXT_READERS:
        return TEXT_READERS[before], COMPRESSIONS[last]
    return (READERS[last], None) if last in READERS else None


def read_numbered(path: Path, warn: Warn, encoding: str = "", me: str = "") -> Numbered:
    try:
        with path.open("rb") as file:
            rows = _read_file(file, path, warn, encoding)
            may_be_chat = me or path.suffix.lower() in (".json", ".txt", ".zip")
            yield from cut_chats(rows, me, warn) if may_be_chat else rows
    except FileNotFoundError as error:
        several = "; to pass several files, repeat --data or pass a pattern" * ("," in path.name)
        hint = nearest_name(path) or several
        raise LorafoldError(f"{path}: there is no such file{hint}") from error
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        what = "" if isinstance(error, Unreadable) else "can't be read: "
        raise LorafoldError(f"{path}: {what}{reason}") from error


def _read_file(file: io.BufferedReader, path: Path, warn: Warn, encoding: str) -> Numbered:
    read, compression = file_format(path) or (_read_lines, None)
    if read is _read_zip:
        yield from _read_zip(file, warn, encoding)
        return
    with _decompress(file, compression) as plain:
        begins, is_text = plain.peek(64)[:64], read in TEXT_READERS.values()
        start = begins.lstrip().lower()
        for sign, what in PREFIXES.items() if is_text or begins.startswith(b"version") else ():
            if start.startswith(sign.lower()):
                raise Unreadable(f"found {what}")
        if encoding and not is_text:
            warn(f"--encoding is not used, because {path.name} is not a text file")
        encoding = encoding or "utf-16" * (begins[:2] in UTF16_BOMS)
        if is_text and (encoding or read in (TEXT_READERS[".csv"], TEXT_READERS[".tsv"])):
            plain = as_utf8(plain, encoding, warn)
        yield from read(plain, warn)


def _read_zip(file: io.BufferedReader, warn: Warn, encoding: str = "") -> Numbered:
    """Reads the only file of rows, or the conversations of an export."""
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n[-1:] != "/" and not n.startswith("__MACOSX/")]
        known = [n for n in names if file_format(Path(n)) and not n.lower().endswith(".zip")]
        chosen = list(filter(EXPORT.search, known)) or known
        if len(chosen) != 1 and chosen == known:
            found = listed(known) or "no file of rows"
            raise Unreadable(f"found {found}, expected one; unpack it, and pass the directory")
        if others := [name for name in names if name not in chosen]:
            warn(f"reads {listed(chosen)}; left out: {listed(others)}")
        for name in chosen:
            if archive.getinfo(name).flag_bits & 1:
                raise Unreadable("protected by a password; unpack it, and pass the file in it")
            member = io.BufferedReader(cast(Any, archive.open(name)))
            yield from _read_file(member, Path(name), warn, encoding)


def _decompress(file: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    if compression is None:
        return file
    import pyarrow as pa

    if (begins := file.peek(4)) and not begins.startswith(MAGIC[compression]):
        raise Unreadable(f"found no {compression} data; if the file is plain text, rename it")
    return io.BufferedReader(pa.CompressedInputStream(file, compression))


def _read_lines(lines: Iterable[bytes], warn: Warn = print) -> Numbered:
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


def _read_json(file: io.BufferedReader, warn: Warn) -> Numbered:
    first = file.readline(MAX_PARSED).removeprefix(BOM)
    if first.lstrip()[:1] == b"{" and isinstance(parse_row(first), dict):
        yield from _read_lines(chain([first], file))
        return
    whole = first + file.read(MAX_PARSED)
    if len(whole) >= MAX_PARSED:
        if whole.lstrip()[:1] == b"[":
            yield from _read_elements(whole, file)
            return
        whole += file.read(MAX_OBJECT)
        if file.read(1):
            raise Unreadable(TOO_LARGE)
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


def _read_elements(begin: bytes, file: io.BufferedReader) -> Numbered:
    """Reads the objects of a long list one by one."""
    decoder, parser = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
    text, at, number = decoder.decode(begin).lstrip()[1:], 0, 1
    while True:
        at += len(SEPARATOR.match(text, at)[0])  # type: ignore[index]
        try:
            if text[at] == "]":
                return
            value, end = parser.raw_decode(text, at)
        except (IndexError, json.JSONDecodeError) as error:
            piece = file.read(max(READ_BYTES, len(text) - at))
            if not piece or len(text) - at > 16 * MAX_PARSED:
                raise Unreadable(f"row {number}: not JSON, or too long: {error}") from error
            text, at = text[at:] + decoder.decode(piece), 0
            continue
        yield number, check_row(value, suspicious(text[at:end]))
        at, number = end, number + 1


def _read_csv(file: io.BufferedReader, warn: Warn, delimiter: str = "") -> Numbered:
    csv.field_size_limit(2**31 - 1)  # bytes
    last_line = 1  # the last line of the last good record

    def records(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
        nonlocal last_line
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        for record in filter(None, reader):
            last_line = reader.line_num
            yield record

    with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        try:
            first = list(islice(lines, HEADER_ROWS))
            if first and (separator := re.fullmatch(r"sep=(.)\s*", first[0])):  # written by Excel
                delimiter, first = separator[1], first[1:]
            # the most frequent one in the header outside of quotes; on a tie, the earlier one
            bare = [re.sub(r'"[^"]*"', "", line) for line in first if line.strip()] or [""]
            choice = max(",;\t|", key=bare[0].count)
            if choice not in bare[0] and len(bare) > 1 and bare[0].strip() not in ONE_COLUMN:
                choice = max(",;\t|", key=bare[1].count)  # below a title
            yield from _read_table(records(chain(first, lines), delimiter or choice), warn)
        except UnicodeDecodeError as error:
            reason = f"invalid UTF-8 soon after line {last_line}; save the whole file as UTF-8"
            raise Unreadable(reason) from error
        except csv.Error as error:
            reason = "a quote is not closed" if "unexpected end" in str(error) else str(error)
            raise Unreadable(f"not CSV after line {last_line}: {reason}") from error


def _read_xlsx(file: io.BufferedReader, warn: Warn) -> Numbered:
    """Reads the first sheet of a workbook, with the saved values of formulas."""
    try:
        from openpyxl import load_workbook

        books = [load_workbook(file, read_only=True, data_only=only) for only in (True, False)]
    except ImportError as error:
        message = "reading workbooks requires openpyxl; run pip install 'lorafold[xlsx]'"
        raise Unreadable(message) from error
    except (zipfile.BadZipFile, KeyError) as error:
        message = "not a workbook, or protected by a password, which must be removed first"
        raise Unreadable(message) from error
    sheet, *others = books[0].sheetnames
    if others:
        warn(f"reads the sheet {sheet!r}; left out: {listed(map(repr, others))}")

    for book in books:  # openpyxl omits cells outside of dimensions, which may be wrong
        book.worksheets[0].reset_dimensions()
    width = max(map(len, books[0].worksheets[0].rows), default=0)

    def records() -> Iterator[list[str]]:
        for cells, formulas in zip(*(book.worksheets[0].rows for book in books), strict=True):
            for cell, formula in zip(cells, formulas, strict=True):
                if formula.data_type == "f" and cell.value is None:
                    raise Unreadable(
                        f"cell {formula.coordinate}: found a formula without a saved value; open"
                        " the workbook in a spreadsheet program, and save it"
                    )
            values = ("" if cell.value is None else str(cell.value) for cell in cells)
            yield [*values, *[""] * (width - len(cells))]

    yield from _read_table(records(), warn)


def _read_table(records: Iterator[list[str]], warn: Warn) -> Numbered:
    """Reads rows below a header. A column without a name is named after its number."""
    first = list(islice(records, HEADER_ROWS))
    filled = [sum(bool(value.strip()) for value in values) for values in first]
    start = next((n for n, count in enumerate(filled) if count > 1), 0)
    title, below = " ".join(chain(*first[:start])).strip(), list(filter(None, filled[start + 1 :]))
    if below[:1] in ([], [1]) or title.partition(" ")[0] in ONE_COLUMN:
        start = 0
    if start:
        warn(f"the header is row {start + 1} of the table; above it, {title!r} is left out")
    names = first[start] if first else []
    names = [name if name.strip() else f"column {n}" for n, name in enumerate(names, 1)]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        found = ", ".join(map(repr, repeated))
        raise Unreadable(f"header: found {found} more than once, expected each name once")
    for number, values in enumerate(chain(first[start + 1 :], records), 1):
        given = len(values)
        if not "".join(values).strip():
            yield number, dict.fromkeys(names, "")
        elif given == len(names):
            yield number, dict(zip(names, values, strict=True))
        else:
            quotes = "; quote values that contain the delimiter" * (given > len(names))
            yield number, f"found {given} values, expected {len(names)} as in the header{quotes}"


def _read_parquet(file: io.BufferedReader, warn: Warn) -> Numbered:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        yield from _read_batches(table.iter_batches(TABLE_ROWS))


def _read_arrow(file: io.BufferedReader, warn: Warn) -> Numbered:
    import pyarrow as pa

    try:
        batches = pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return _read_batches(pa.ipc.open_stream(file))
    return _read_batches(batches.get_batch(n) for n in range(batches.num_record_batches))


def _read_batches(batches: Iterable[pa.RecordBatch]) -> Numbered:
    few = (b.slice(at, TABLE_ROWS) for b in batches for at in range(0, len(b), TABLE_ROWS))
    return enumerate((row for batch in few for row in batch.to_pylist()), 1)


TEXT_READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".txt": read_whatsapp,
}
READERS = TEXT_READERS | {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".xlsx": _read_xlsx,
    ".zip": _read_zip,
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
SUPPORTED = f"{', '.join(READERS)} (text also as .gz, .bz2 or .zst)"
