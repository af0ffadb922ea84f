"""The adapters' directory: which of its entries may be read as adapters, and what they say.

Only `DIR/NAME` is ever read, where NAME comes from the directory's own listing and not from a
client. Entries that lead outside are refused: whoever may write one adapter could else replace, or
borrow, another one's files. A hard link borrows likewise, but nothing shows which of its names was
first; so `lorafold.serving.verifier` takes files with several for what they were before, and for
nothing else.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from lorafold.core.attach import Origin
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.contents import FRESH, Contents, FileStamp
from lorafold.identity import WORDS
from lorafold.models.tokenizer import FILES as TOKENIZER
from lorafold.models.tokenizer import TEMPLATES
from lorafold.peft.config import CONFIG
from lorafold.peft.provenance import beside
from lorafold.peft.saved import FILES

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
MOST, PAGE = 4 << 30, 32 << 20  # bytes of one file of an adapter, and of its page
TOKENIZERS, ENTRIES = 64 << 20, 1000  # bytes of all files of a tokenizer, and an adapter's files
# seconds between looks at what may be written again without another mark, and at what may not
PAUSE, AGAIN = 0.25, 2.0


class Directory:
    """A directory of adapters, or one adapter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise LorafoldError(f"--adapters {path}: found no directory, expected one")
        self._single = _has_config(path)
        self._names: frozenset[str] = frozenset()
        self._listed = -math.inf, -1  # when, and which state of the directory

    def names(self) -> frozenset[str]:
        """The names of all entries that look like adapters; hidden ones are left alone. It is read
        again when it changes, and now and then: a file may come into an entry later.
        """
        if self._single:
            return frozenset({self.path.resolve().name})
        changed = self.path.stat().st_mtime_ns
        (when, listed), now = self._listed, time.monotonic()
        fresh = abs(time.time() - changed / 1e9) < FRESH
        if changed != listed or now - when > (PAUSE if fresh else AGAIN):
            with os.scandir(self.path) as entries:
                found = [entry.name for entry in entries if not entry.name.startswith(".")]
            self._names = frozenset(_shown(n) for n in found if _has_config(self.path / n))
            self._listed = now, changed  # not before: what can't be read now is read again
        return self._names

    @property
    def beside(self) -> Path:
        """Where files may lie that are about the adapters and no adapter's own."""
        return self.path.parent if self._single else self.path

    def others(self) -> list[str]:
        """The names of directories that are no adapters."""
        if self._single:
            return []
        names = self.names()
        with os.scandir(self.path) as entries:
            return sorted(
                entry.name for entry in entries
                if entry.name not in names and not entry.name.startswith(".") and entry.is_dir()
            )  # fmt: skip

    def marks(self, path: Path) -> dict[str, FileStamp]:
        """The marks of all files of an adapter, by names with that of its directory."""
        found = dict[str, FileStamp]()
        for place in (path, path / TEMPLATES):
            if not place.is_dir():
                continue
            with os.scandir(place) as listing:
                entries = list(islice(listing, ENTRIES + 1))
            if len(entries) > ENTRIES:  # what was not looked at might change without a mark
                raise LorafoldError(f"found more than {ENTRIES:,} files, expected an adapter's")
            for entry in entries:
                try:
                    about = entry.stat()
                except OSError:  # a link to nothing, or a file that is gone by now
                    continue
                if stat.S_ISREG(about.st_mode):
                    where = Path(entry.path).relative_to(path)
                    found[_shown(f"{path.name}/{where}")] = FileStamp.of(about)
        return found

    def touch(self, name: str) -> object:
        """The marks of an adapter's files, None for one that may not be read."""
        try:
            return self.marks(self.locate(name))
        except (LorafoldError, OSError):
            return None

    def linked(self, path: Path, names: Iterable[str]) -> list[str]:
        """Those of an adapter's files that other names lead to as well."""
        return [n for n in names if not self._single and (path / n).stat().st_nlink > 1]

    def words(self, path: Path) -> list[str]:
        """The names of the files of an adapter's tokenizer, and of those that it might have."""
        marks = {name.partition("/")[2]: mark for name, mark in self.marks(path).items()}
        there = [name for name in marks if any(fnmatchcase(name, p) for p in WORDS)]
        self._check_own(*(path / name for name in {*there, *TOKENIZER}))
        if (size := sum(marks[name].size for name in there)) > TOKENIZERS:
            raise LorafoldError(
                f"its tokenizer: found {len(there):,} files of {size:,} bytes, expected at most"
                f" {TOKENIZERS:,}"
            )
        return sorted({*there, *TOKENIZER})

    def tokenizer(self, path: Path) -> Contents:
        """The files of an adapter's tokenizer."""
        contents = Contents(path, self.words(path), 2 * TOKENIZERS)
        contents.check_intact()
        return contents

    def page(self, name: str) -> Path | None:
        """The page that `lorafold inspect --html` wrote beside an adapter, as NAME.html."""
        file = f"{self.beside}/{name}.html"
        try:
            about = os.lstat(file)
        except OSError:
            return None
        own = stat.S_ISREG(about.st_mode) and about.st_nlink == 1
        return Path(file) if own and about.st_size <= PAGE else None

    def locate(self, name: str) -> Path:
        """Where an adapter is."""
        if not NAME.fullmatch(name):
            raise LorafoldError(
                f"name: found {name[:80]!r}, expected up to 64 letters, digits and . _ -"
            )
        if name not in self.names():
            self._listed = -math.inf, -1  # it may have come within a tick of the disk's clock
        if name not in self.names():
            raise LorafoldError(f"found no adapter {name}, expected one of the directory's")
        path = self.path if self._single else self.path / name
        self._check_own(path, *(path / each for each in (*FILES, MANIFEST)))
        return path

    def below(self, origin: Origin, path: Path) -> Path:
        """Where an adapter is that the one at `path` lies over."""
        if not self._single:
            self.locate(Path(origin.path).name)
        return beside(origin, path)

    def _check_own(self, *files: Path) -> None:
        """Raise LorafoldError for a file that is not the directory's own."""
        root = self.path.resolve()
        for file in files:
            if not os.path.lexists(file):
                continue
            if not (file.is_file() or file.is_dir()):
                raise LorafoldError(f"{file.name}: found neither a file nor a directory")
            if self._single:
                continue
            if root not in file.resolve().parents:
                raise LorafoldError(f"{file.name} is a link that leads outside of {self.path}")
            about = file.stat()
            if not file.is_dir() and about.st_size > MOST:
                told = f"found {about.st_size:,} bytes, expected at most {MOST:,}"
                raise LorafoldError(f"{file.name}: {told}")


def _shown(name: str) -> str:
    """A name as answers can have it; one that is no UTF-8 gets one that no adapter may have."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _has_config(path: Path) -> bool:
    return os.path.exists(path / CONFIG)
