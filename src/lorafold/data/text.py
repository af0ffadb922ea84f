"""The bytes of a file of rows as UTF-8, and what a file is that is no text of rows.

    as_utf8(file, windows, tell)     UTF-8 unchanged, UTF-16 with its byte order mark as UTF-8

Excel saves CSV in Windows-1252 unless it is asked for UTF-8. Such a file is read as that where it
is allowed (`windows`) and can only be that: all before the first byte that is no UTF-8 is ASCII,
what follows has no control characters, and no four letters outside of ASCII in a row, which text in
other code pages has. It is said, with a word by which a wrong guess shows.
"""

import codecs
import io
import re
from collections.abc import Callable

Tell = Callable[[str], None]
PIECE = 1 << 16  # bytes
WINDOWS = "cp1252"
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
AS_CSV = "save it as CSV in UTF-8, or: pandas.read_excel(FILE).to_csv('rows.csv', index=False)"
NEITHER = "neither UTF-8 nor Windows-1252; save it as UTF-8: iconv -f ENCODING -t utf-8 FILE"
# what a file is, by its first bytes
SIGNS = {
    b"PK\x03\x04": f"a spreadsheet or another zip file, expected rows; {AS_CSV}",
    b"\xd0\xcf\x11\xe0": f"a spreadsheet, expected rows; {AS_CSV}",
    b"%PDF": "a PDF, expected rows; write its text into a file of rows",
    b"\x1f\x8b": "what gzip compressed; expected a name that ends with .gz",
    b"BZh": "what bzip2 compressed; expected a name that ends with .bz2",
    b"\x28\xb5\x2f\xfd": "what zstd compressed; expected a name that ends with .zst",
    b"PAR1": "Parquet; expected a name that ends with .parquet",
    b"ARROW1": "Arrow; expected a name that ends with .arrow",
    b"version https://git-lfs": "what git-lfs keeps in place of the file: git lfs pull fetches it",
    b"<!doctype": "a web page, expected rows; what was fetched is not the file itself",
    b"<html": "a web page, expected rows; what was fetched is not the file itself",
}
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
FOREIGN = re.compile(r"[^\W\d_a-zA-Z]{4}")  # letters of another alphabet, read as Windows-1252
LETTERS = re.compile(r"\w*[^\W\d_a-zA-Z]\w*")
WORD = re.compile(r"\w*[^\x00-\x7f]\w*")


class Unreadable(ValueError):
    """What is wrong with a file as a whole, in one line."""


def other_than_rows(begins: bytes) -> str:
    """What a file is that begins so, and what to do; empty for what may be text of rows."""
    start = begins.lstrip().lower()
    return next((told for sign, told in SIGNS.items() if start.startswith(sign.lower())), "")


def as_utf8(file: io.BufferedReader, windows: bool, tell: Tell) -> io.BufferedReader:
    """The file with its text in UTF-8; what is neither that nor known stays as it is.

    Args:
        windows: Whether it may be in Windows-1252.
        tell: Is told where it is.
    """
    begins = file.peek(2)[:2]
    if not windows and begins not in WIDE:
        return file
    stream: io.RawIOBase = _Utf8(file, begins in WIDE, tell)
    return io.BufferedReader(stream, PIECE)


class _Utf8(io.RawIOBase):
    """Final: another file's text in UTF-8, as it is read."""

    def __init__(self, file: io.BufferedReader, wide: bool, tell: Tell) -> None:
        self._file, self._tell = file, tell
        self._codec = "utf-16" if wide else "utf-8"
        self._decoder = codecs.getincrementaldecoder(self._codec)()
        self._plain = not wide  # so far there is ASCII alone
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        more = True
        while more and not self._ready:
            piece = self._file.read1(PIECE)
            more = bool(piece)
            self._ready = self._read(piece)
        count = min(len(into), len(self._ready))
        into[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _read(self, piece: bytes) -> bytes:
        """A piece of the file in UTF-8, or as it is. Raises Unreadable for what is no text."""
        if not self._codec or (self._plain and piece.isascii()):
            return piece
        waiting = b"" if self._codec == WINDOWS else self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            whole = waiting + piece
            if self._codec == "utf-16":
                raise Unreadable("no UTF-16, as its first bytes say; save it as UTF-8") from error
            if self._codec == WINDOWS:
                raise Unreadable(NEITHER) from error
            if not (self._plain and whole[: error.start].isascii()):
                self._codec = ""  # whoever reads the rows says which of them is no text
                return whole
            return self._switched(whole)
        if self._codec == WINDOWS:
            _check(text)
        self._plain = self._plain and text.isascii()
        return text.encode()

    def _switched(self, piece: bytes) -> bytes:
        """The piece in which the first byte stands that is no UTF-8."""
        self._codec, self._decoder = WINDOWS, codecs.getincrementaldecoder(WINDOWS)()
        try:
            text = self._decoder.decode(piece)
        except UnicodeDecodeError as error:
            raise Unreadable(NEITHER) from error
        _check(text)
        found = LETTERS.search(text) or WORD.search(text)
        self._tell(
            f"no UTF-8, so it is read as Windows-1252, as Excel saves CSV: {found and found[0]!r};"
            " where that is wrong, save it as UTF-8"
        )
        return text.encode()


def _check(text: str) -> None:
    """Raise Unreadable for what can't have been text in Windows-1252."""
    if CONTROLS.search(text):
        raise Unreadable("not text; expected CSV in UTF-8, or in UTF-16 with its byte order mark")
    if FOREIGN.search(text):
        raise Unreadable(NEITHER)
