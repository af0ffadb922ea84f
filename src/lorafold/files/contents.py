"""Files that are read once, so that the verified bytes are also the bytes used; and cached digests.

Digests are cached by file stamp in `CACHE/digests/known/DEVICE-INODE`. A file in the Hugging Face
cache whose name is its SHA-256 is not read. Cached digests identify files and don't detect
corruption.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, as_object, check_intact, write_text
from lorafold.files.atomic import sha256 as file_sha256
from lorafold.files.paths import cache_directory
from lorafold.files.record import RECORD

READ_BYTES = 1 << 20
HUB_BLOB = re.compile(r"[0-9a-f]{64}")  # name of a large file in the Hugging Face cache
FRESH_SECONDS = 2.0  # within this time, another write may not change the stamp
NUM_THREADS = 4


def digest(files: Iterable[tuple[str, int, str]]) -> str:
    """Hashes the (name, size, SHA-256) of files, sorted by name."""
    lines = (f"{name} {size} {own}\n" for name, size, own in sorted(files))
    return sha256("".join(lines).encode()).hexdigest()


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file and yields it with its size. Raises OSError for anything else, such as a
    pipe, which would block.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        yield file, about.st_size


def _bytes(path: Path, most: float) -> bytearray | None:
    with open_regular(path) as (file, size):
        if size > most:
            return None
        content = bytearray(size)
        del content[file.readinto(content) :]  # type: ignore[attr-defined]
        while len(content) <= most and (more := file.read(READ_BYTES)):  # the file has grown
            content += more
        return content if len(content) <= most else None


class Contents:
    """The bytes of the named files that exist and of the manifest, hashed in a thread. Raises if a
    file can't be read, or before reading more than `most` bytes in total.
    """

    def __init__(self, directory: str | Path, names: Sequence[str], most: float = math.inf) -> None:
        self.path, self.names = Path(directory).expanduser(), tuple(names)
        self.files: dict[str, bytearray] = {}
        for name in (*names, MANIFEST):
            try:
                content = _bytes(self.path / name, most - sum(map(len, self.files.values())))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise LorafoldError(
                    f"{self.path}: {name} can't be read ({error.strerror})"
                ) from None
            if content is None:
                raise LorafoldError(
                    f"{self.path}: expected at most {most:,} bytes in total, found more with"
                    f" {name}; if this file changed, load the adapter again"
                )
            self.files[name] = content
        thread = ThreadPoolExecutor(1)
        self._hashing = {n: thread.submit(sha256, content) for n, content in self.files.items()}
        thread.shutdown(wait=False)

    @property
    def named(self) -> str:
        """SHA-256 of names and contents, without the manifest, which also covers other files."""
        return self.digest_of(self.names)

    def digest_of(self, names: Iterable[str]) -> str:
        return digest((name, *self.entries[name]) for name in names if name in self.entries)

    @cached_property
    def entries(self) -> dict[str, tuple[int, str]]:
        """(bytes, SHA-256) of each file."""
        return {
            name: (len(self.files[name]), own.result().hexdigest())
            for name, own in self._hashing.items()
        }

    def check_intact(self) -> None:
        if MANIFEST in self.files:
            check_intact(self.path, self.names, self.files[MANIFEST], self.entries)

    @property
    def record(self) -> dict[str, Any]:
        return self.object(RECORD) if RECORD in self.files else {}

    def object(self, name: str) -> dict[str, Any]:
        return as_object(self.files[name], self.path / name)


class FileStamp(NamedTuple):
    """The file's identity, size and times in nanoseconds, which change with the file's content."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, about: os.stat_result) -> FileStamp:
        return cls(about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Whether any further write would change the stamp."""
        return time.time_ns() - max(self.modified, self.changed) > FRESH_SECONDS * 1e9


def file_digest(path: Path) -> tuple[int, str]:
    """Returns the (bytes, SHA-256) of a file, from the cache if possible."""
    try:
        real = path.resolve(strict=True)
        stamp = FileStamp.of(real.stat())
        if real.parent.name == "blobs" and HUB_BLOB.fullmatch(real.name):
            return stamp.size, real.name
        entry = cache_directory() / "digests" / "known" / f"{stamp.device:x}-{stamp.inode:x}"
        with suppress(OSError, ValueError, KeyError, TypeError):
            cached = json.loads(entry.read_bytes())
            if cached["marks"] == list(stamp):
                return stamp.size, str(cached["sha256"])
        digest = file_sha256(real)
        unchanged = FileStamp.of(real.stat()) == stamp
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read ({error.strerror})") from None
    if unchanged and stamp.settled:
        with suppress(LorafoldError, OSError):  # caching is optional
            entry.parent.mkdir(parents=True, exist_ok=True)
            write_text(entry, json.dumps({"marks": stamp, "sha256": digest}))
    return stamp.size, digest


def files_digest(
    directory: Path, names: Iterable[str], read: Mapping[str, tuple[int, str]] | None = None
) -> str:
    """Hashes the names, sizes and contents of existing files that match `names`, which may be glob
    patterns. `read` is the (bytes, SHA-256) of files that the caller has read.
    """
    found = {path for name in names for path in directory.glob(name) if path.is_file()}
    shown = sorted(path.relative_to(directory).as_posix() for path in found)
    known = read or {}
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        entries = threads.map(lambda name: known.get(name) or file_digest(directory / name), shown)
        return digest((name, *own) for name, own in zip(shown, entries, strict=True))
