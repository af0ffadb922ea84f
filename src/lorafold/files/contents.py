"""The files of a directory, each read once: what is verified is what is used.

    contents = Contents("adapter", ["adapter_config.json", ...])
    contents.named                      SHA-256 over their names and bytes
    contents.check_intact()             as `intact.check_intact` checks files on the disk
    contents.object("adapter_config.json")
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST, check, compare, is_ours
from lorafold.files.record import RECORD, as_object

PIECE = 1 << 20  # bytes


def digest(files: Iterable[tuple[str, int, str]]) -> str:
    """The SHA-256 over the name, the size and the SHA-256 of each file, by name, in hexadecimal."""
    lines = (f"{name} {size} {own}\n" for name, size, own in sorted(files))
    return sha256("".join(lines).encode()).hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A file and its size in bytes; OSError for anything else, such as a pipe, which is not waited
    for.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield file, about.st_size


def _bytes(path: Path, most: float) -> bytearray | None:
    """The content of a file; None for one of more than so many bytes, which is not read."""
    with opened(path) as (file, size):
        if size > most:
            return None
        content = bytearray(size)
        del content[file.readinto(content) :]  # type: ignore[attr-defined]
        while len(content) <= most and (more := file.read(PIECE)):  # written to it meanwhile
            content += more
        return content if len(content) <= most else None


class Contents:
    """The bytes of those of the named files that exist, by name, and of the manifest. A thread
    hashes them while the caller interprets them. Raises LorafoldError if a file can't be read, and
    before it reads one with which they would be too large.

    Args:
        names: the files.
        most: the most bytes of all of them.
    """

    def __init__(self, directory: str | Path, names: Sequence[str], most: float = math.inf) -> None:
        self.path, self.names = Path(directory).expanduser(), tuple(names)
        self.files: dict[str, bytearray] = {}
        for name in (*names, MANIFEST):
            try:
                content = _bytes(self.path / name, most - self.nbytes)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                text = f"{self.path}: {name} can't be read ({error.strerror})"
                raise LorafoldError(text) from None
            if content is None:
                raise LorafoldError(
                    f"{self.path}: expected at most {most:,} bytes of files, found more with"
                    f" {name}; if it changed, load it again"
                )
            self.files[name] = content
        thread = ThreadPoolExecutor(1)
        self._hashing = thread.submit(self._hash)
        thread.shutdown(wait=False)

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(map(len, self.files.values()))

    @cached_property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file, in hexadecimal."""
        return self._hashing.result()

    def _hash(self) -> dict[str, str]:
        return {name: sha256(content).hexdigest() for name, content in self.files.items()}

    @property
    def named(self) -> str:
        """The SHA-256 over the names and the contents of the files, without the manifest, which
        tells of other files too, in hexadecimal.
        """
        return self.digest_of(self.names)

    def digest_of(self, names: Iterable[str]) -> str:
        """The same over those of these files that exist."""
        entries = self.entries
        return digest((name, *entries[name]) for name in names if name in entries)

    @property
    def entries(self) -> dict[str, tuple[int, str]]:
        """(bytes, SHA-256 in hexadecimal) of each file."""
        return {name: (len(content), self.digests[name]) for name, content in self.files.items()}

    def check_intact(self) -> None:
        """Raise LorafoldError unless the files are as lorafold wrote them."""
        manifest = self.files.get(MANIFEST)
        if manifest is not None and is_ours(manifest):
            check(self.path, compare(manifest, self.names, self._found))

    @property
    def listed(self) -> frozenset[str]:
        """The names in the manifest, if lorafold wrote it: `check_intact` says if it is damaged."""
        manifest = self.files.get(MANIFEST)
        if manifest is None or not is_ours(manifest):
            return frozenset()
        return frozenset(self.object(MANIFEST)["files"])

    @property
    def record(self) -> dict[str, Any]:
        """The content of `lorafold.json`; empty if there is none."""
        return self.object(RECORD) if RECORD in self.files else {}

    def object(self, name: str) -> dict[str, Any]:
        """The content of a JSON file. Raises LorafoldError if it is not a JSON object."""
        return as_object(self.files[name], self.path / name)

    def _found(self, name: str) -> tuple[int, Any] | None:
        content = self.files.get(name)
        return None if content is None else (len(content), lambda: self.digests[name])
