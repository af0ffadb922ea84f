"""The directory of adapters. The server reads only entries that `names` lists.

Links out of the directory are rejected, because otherwise a user who may write an adapter could
make the server read any file. Hard links have the same risk, but don't show which file is the
original, so the verifier accepts files with several links only if they are unchanged.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from lorafold.core.attach import Origin
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.contents import FRESH_SECONDS, Contents, FileStamp
from lorafold.identity import WORDS
from lorafold.models.tokenizer import FILES as TOKENIZER
from lorafold.models.tokenizer import TEMPLATES
from lorafold.peft.adapter_directory import FILES
from lorafold.peft.config import CONFIG
from lorafold.peft.provenance import expected_path

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
MAX_FILE_BYTES, MAX_PAGE_BYTES = 4 << 30, 32 << 20
MAX_TOKENIZER_BYTES, MAX_FILES = 64 << 20, 1000  # per adapter
# seconds between listings of the directory; the first applies if it has just changed, because
# another change may not alter its mtime
FRESH_INTERVAL, LISTING_INTERVAL = 0.25, 2.0


class Directory:
    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise LorafoldError(f"--adapters {path}: this is not an existing directory")
        self._single = _has_config(path)
        self._names: frozenset[str] = frozenset()
        self._listed = -math.inf, -1  # time of the listing, mtime of the directory

    def names(self) -> frozenset[str]:
        """Returns the entries that look like adapters. The directory is listed again after changes
        and periodically, because an entry may get its config later.
        """
        if self._single:
            return frozenset({self.path.resolve().name})
        changed = self.path.stat().st_mtime_ns
        (when, listed), now = self._listed, time.monotonic()
        fresh = abs(time.time() - changed / 1e9) < FRESH_SECONDS
        if changed != listed or now - when > (FRESH_INTERVAL if fresh else LISTING_INTERVAL):
            entries = [name for name in os.listdir(self.path) if not name.startswith(".")]
            self._names = frozenset(_utf8(n) for n in entries if _has_config(self.path / n))
            self._listed = now, changed  # set last, so that a failed listing is repeated
        return self._names

    @property
    def pages_directory(self) -> Path:
        return self.path.parent if self._single else self.path

    def without_config(self) -> list[str]:
        if self._single:
            return []
        entries = os.listdir(self.path)
        without_config = {n for n in entries if not n.startswith(".") and (self.path / n).is_dir()}
        return sorted(without_config - self.names())

    def stamps(self, path: Path) -> dict[str, FileStamp]:
        stamps = dict[str, FileStamp]()
        for place in (path, path / TEMPLATES):
            if not place.is_dir():
                continue
            with os.scandir(place) as listing:
                entries = list(islice(listing, MAX_FILES + 1))
            if len(entries) > MAX_FILES:  # changes of further files would be missed
                raise LorafoldError(f"found more than {MAX_FILES:,} files, too many for an adapter")
            for entry in entries:
                with suppress(OSError):  # a dangling link or a deleted file
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        where = Path(entry.path).relative_to(path)
                        stamps[_utf8(f"{path.name}/{where}")] = FileStamp.of(status)
        return stamps

    def stamps_or_none(self, name: str) -> object:
        try:
            return self.stamps(self.locate(name))
        except (LorafoldError, OSError):
            return None

    def hard_linked(self, path: Path, names: Iterable[str]) -> list[str]:
        return [n for n in names if not self._single and (path / n).stat().st_nlink > 1]

    def tokenizer_files(self, path: Path) -> list[str]:
        """Returns the names of files that an adapter's tokenizer has or could have."""
        stamps = {name.partition("/")[2]: mark for name, mark in self.stamps(path).items()}
        present = [name for name in stamps if any(fnmatchcase(name, p) for p in WORDS)]
        self._check_own(*(path / name for name in {*present, *TOKENIZER}))
        if (size := sum(stamps[name].size for name in present)) > MAX_TOKENIZER_BYTES:
            raise LorafoldError(
                f"tokenizer: found {len(present):,} files of {size:,} bytes in total, expected at"
                f" most {MAX_TOKENIZER_BYTES:,} bytes"
            )
        return sorted({*present, *TOKENIZER})

    def tokenizer(self, path: Path) -> Contents:
        contents = Contents(path, self.tokenizer_files(path), 2 * MAX_TOKENIZER_BYTES)
        contents.check_intact()
        return contents

    def page_file(self, name: str) -> Path | None:
        file = f"{self.pages_directory}/{name}.html"
        try:
            status = os.lstat(file)
        except OSError:
            return None
        regular = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
        return Path(file) if regular and status.st_size <= MAX_PAGE_BYTES else None

    def locate(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise LorafoldError(
                f"name: found {name[:80]!r}, expected up to 64 letters, digits and . _ - (the first"
                " may not be . or -)"
            )
        if name not in self.names():
            self._listed = -math.inf, -1  # the entry may be newer than the mtime shows
        if name not in self.names():
            raise LorafoldError(f"the directory of adapters has no adapter {name}")
        path = self.path if self._single else self.path / name
        self._check_own(path, *(path / each for each in (*FILES, MANIFEST)))
        return path

    def base_adapter_path(self, origin: Origin, path: Path) -> Path:
        if not self._single:
            self.locate(Path(origin.path).name)
        return expected_path(origin, path)

    def _check_own(self, *files: Path) -> None:
        root = self.path.resolve()
        for file in files:
            if not os.path.lexists(file):
                continue
            if not (file.is_file() or file.is_dir()):
                raise LorafoldError(f"{file.name}: expected a regular file or a directory")
            if self._single:
                continue
            if root not in file.resolve().parents:
                raise LorafoldError(f"{file.name} is a link that leads outside of {self.path}")
            if file.is_file() and (size := file.stat().st_size) > MAX_FILE_BYTES:
                most = f"expected at most {MAX_FILE_BYTES:,}"
                raise LorafoldError(f"{file.name}: found {size:,} bytes, {most}")


def _utf8(name: str) -> str:
    """Escapes a name that isn't UTF-8. The result is not a valid name of an adapter."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _has_config(path: Path) -> bool:
    return os.path.exists(path / CONFIG)
