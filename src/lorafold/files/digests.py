"""The SHA-256 of files, known again by their marks: a file is read once, and then looked at.

    CACHE/digests/known/DEVICE-INODE        {"marks": [device, inode, ...], "sha256": "5d1c..."}

A file of the Hugging Face hub whose own name is its SHA-256 is not read at all. Whoever interprets
a file checks it by other means: these digests tell one thing from another.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from lorafold.errors import LorafoldError
from lorafold.files.atomic import sha256, write_text
from lorafold.files.cache import cache_directory
from lorafold.files.contents import digest

HUB = re.compile(r"[0-9a-f]{64}")  # the name of a large file among the hub's blobs
FRESH = 2.0  # seconds for which what was written may be written again without another mark
AT_ONCE = 4


class Marks(NamedTuple):
    """What tells a file that was not touched since from any other; times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, about: os.stat_result) -> Marks:
        """The marks in what the system says of a file."""
        times = about.st_mtime_ns, about.st_ctime_ns
        return cls(about.st_dev, about.st_ino, about.st_size, *times)

    @property
    def settled(self) -> bool:
        """Whether the file can't be written again without another mark."""
        return time.time_ns() - max(self.modified, self.changed) > FRESH * 1e9


def of_file(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256 in hexadecimal) of a file. Raises LorafoldError if it can't be read."""
    try:
        real = path.resolve(strict=True)
        marks = Marks.of(real.stat())
        if real.parent.name == "blobs" and HUB.fullmatch(real.name):
            return marks.size, real.name
        entry = cache_directory() / "digests" / "known" / f"{marks.device:x}-{marks.inode:x}"
        if (known := _known(entry, marks)) is not None:
            return marks.size, known
        found = sha256(real)
        unchanged = Marks.of(real.stat()) == marks
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read ({error.strerror})") from None
    if unchanged and marks.settled:
        _keep(entry, marks, found)
    return marks.size, found


def of_files(
    directory: Path, names: Iterable[str], read: Mapping[str, tuple[int, str]] | None = None
) -> str:
    """The SHA-256 over the names, sizes and contents of those of these files that exist.

    Args:
        directory: where the files are.
        names: names within it, or patterns such as `*.safetensors`.
        read: (bytes, SHA-256 in hexadecimal) of those that were read already, by name.

    Raises LorafoldError for a file that can't be read.
    """
    found = {path for name in names for path in directory.glob(name) if path.is_file()}
    shown = sorted(path.relative_to(directory).as_posix() for path in found)
    known = read or {}

    def entry(name: str) -> tuple[int, str]:
        return known.get(name) or of_file(directory / name)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        entries = list(threads.map(entry, shown))
    return digest((name, *own) for name, own in zip(shown, entries, strict=True))


def _known(entry: Path, marks: Marks) -> str | None:
    try:
        kept = json.loads(entry.read_bytes())
        return str(kept["sha256"]) if kept["marks"] == list(marks) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(entry: Path, marks: Marks, found: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, json.dumps({"marks": marks, "sha256": found}))
    except (LorafoldError, OSError):
        return  # a cache that can't be written costs time alone
