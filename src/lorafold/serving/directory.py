"""The adapters' directory: which of its entries may be read as adapters, and what they say.

Only `DIR/NAME` is ever read, where NAME comes from the directory's own listing and not from a
client. Entries that lead outside, or have files that another name leads to as well, are refused:
whoever may write one adapter could else replace, or borrow, another one's files.
"""

from __future__ import annotations

import os
import re
import stat
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lorafold.core.attach import Origin
from lorafold.engine.adapters import found_below
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.contents import Contents
from lorafold.files.record import RECORD
from lorafold.models.loading import TOKENIZER_FILES, VOCABULARIES
from lorafold.models.tokenizer import CONFIG as SETTINGS
from lorafold.models.tokenizer import FILES as TOKENIZER
from lorafold.models.tokenizer import TEMPLATES
from lorafold.peft.config import CONFIG
from lorafold.peft.directory import FILES
from lorafold.peft.stack import parse

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
MOST, PAGE = 4 << 30, 32 << 20  # bytes of one file of an adapter, and of its page
TOKENIZERS, ENTRIES = 64 << 20, 1000  # bytes of all files of a tokenizer, and an adapter's files
# seconds for which what was written may be written again without a trace, and between looks then
FRESH, PAUSE = 2.0, 0.25


class Mark(NamedTuple):
    """What tells a file that was not touched since from any other."""

    name: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int


class Directory:
    """A directory of adapters, or one adapter. Raises LorafoldError if there is none.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise LorafoldError(f"--adapters {path}: found no directory, expected one")
        self._single = _has_config(path)
        self._names: frozenset[str] = frozenset()
        self._listed = 0.0, -1  # when, and which state of the directory

    def names(self) -> frozenset[str]:
        """The names of all entries that look like adapters; hidden ones are left alone. It is read
        again when it changes.
        """
        if self._single:
            return frozenset({self.path.resolve().name})
        changed = self.path.stat().st_mtime_ns
        (when, listed), now = self._listed, time.time()
        fresh = when - changed / 1e9 < FRESH and now - when > PAUSE
        if changed != listed or fresh:
            self._listed = now, changed
            with os.scandir(self.path) as entries:
                found = [entry.name for entry in entries if not entry.name.startswith(".")]
            self._names = frozenset(_shown(n) for n in found if _has_config(self.path / n))
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

    def marks(self, name: str) -> tuple[Mark, ...]:
        """The marks of all files of an adapter. Raises LorafoldError as `locate` does."""
        path, found = self.locate(name), []
        for place in (path, path / TEMPLATES):
            if place.is_dir():
                with os.scandir(place) as entries:
                    for entry in islice(entries, ENTRIES + 1):
                        try:
                            about = entry.stat()
                        except OSError:  # a link to nothing, or a file that is gone by now
                            continue
                        if stat.S_ISREG(about.st_mode):
                            where = str(Path(entry.path).relative_to(path))
                            found.append(
                                Mark(
                                    where, about.st_dev, about.st_ino, about.st_size,
                                    about.st_mtime_ns, about.st_ctime_ns,
                                )
                            )  # fmt: skip
        if len(found) > ENTRIES:
            raise LorafoldError(f"found more than {ENTRIES:,} files, expected an adapter's alone")
        return tuple(sorted(found))

    def touch(self, name: str) -> object:
        """The marks of an adapter's files, None for one that may not be read."""
        try:
            return self.marks(name)
        except (LorafoldError, OSError):
            return None

    def touched(self, name: str, before: object) -> bool:
        """Whether an adapter's files have other marks than before."""
        return self.touch(name) != before

    def tokenizer(self, name: str) -> Contents | None:
        """The files of an adapter's own tokenizer, or else that of the highest one below it that
        has one, if there is one. Raises as `locate` does, and for damaged files.
        """
        path = self.locate(name)
        if not _has_tokenizer(path):
            record = Contents(path, (RECORD,)).record
            over = (self.below(origin, path) for origin in reversed(parse(record)))
            found = next(filter(_has_tokenizer, over), None)
            if found is None:
                return None
            path = found
        there = {file for p in (*TOKENIZER_FILES, *VOCABULARIES) for file in path.glob(p)}
        files = sorted({*there, *(path / known for known in TOKENIZER)})
        self._check_own(*files)
        size = sum(file.stat().st_size for file in files if file.is_file())
        if size > TOKENIZERS or len(files) > ENTRIES:
            raise LorafoldError(
                f"its tokenizer: found {len(files):,} files of {size:,} bytes, expected at most"
                f" {ENTRIES:,} of {TOKENIZERS:,}"
            )
        contents = Contents(path, [str(file.relative_to(path)) for file in files])
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
        """Where an adapter is. Raises LorafoldError for a name that leads nowhere, or elsewhere."""
        if not NAME.fullmatch(name):
            raise LorafoldError(
                f"name: found {name[:80]!r}, expected up to 64 letters, digits and . _ -"
            )
        if name not in self.names():
            self._listed = 0.0, -1  # it may have come within a tick of the file system's clock
        if name not in self.names():
            raise LorafoldError(f"found no adapter {name}, expected one of the directory's")
        path = self.path if self._single else self.path / name
        self._check_own(path, *(path / each for each in (*FILES, MANIFEST)))
        return path

    def below(self, origin: Origin, path: Path) -> Path:
        """Where an adapter is that the one at `path` lies over. Raises LorafoldError unless it is
        one of the directory's, with the digest that the record says.
        """
        if not self._single:
            self.locate(Path(origin.path).name)
        return found_below(origin, path).path

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
            if not file.is_dir() and (about.st_nlink > 1 or about.st_size > MOST):
                raise LorafoldError(
                    f"{file.name}: found {about.st_nlink} links and {about.st_size:,} bytes,"
                    f" expected one link and at most {MOST:,} bytes; copy it"
                )


def _has_tokenizer(path: Path) -> bool:
    """Whether an adapter has a tokenizer of its own. Raises LorafoldError if it was damaged, and
    waits for no pipe.
    """
    contents = Contents(path, (SETTINGS,))
    contents.check_intact()
    return SETTINGS in contents.files


def _shown(name: str) -> str:
    """A name as answers can have it; one that is no UTF-8 gets one that no adapter may have."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _has_config(path: Path) -> bool:
    return os.path.exists(path / CONFIG)
