"""The cache of reproducible files, in `LORAFOLD_CACHE/KIND/KEY`. Entries appear atomically. A key
must contain everything that affects its entry, except lorafold's version, which is added.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from lorafold.errors import LorafoldError
from lorafold.files.atomic import atomic_directory, is_abandoned, verify
from lorafold.files.paths import cache_directory

LOCK = ".lock"
KINDS = ("digests", "models", "native", "reference", "rows", "svd", "tokens")


@dataclass(frozen=True)
class CacheEntry:
    """An entry of the cache. `used` is the time of its last use, in seconds since 1970."""

    kind: str
    path: Path
    bytes: int
    used: float


def cache_entry(
    kind: str, key: str, write: Callable[[Path], None], notice: Callable[[str], None]
) -> Path:
    """Returns the directory of an intact entry, after `write` has filled it if necessary. `notice`
    receives a message if this takes longer than a look-up.
    """
    return fill_once(_entry_path(kind, key), write, notice)


def fill_once(path: Path, write: Callable[[Path], None], notice: Callable[[str], None]) -> Path:
    with _locked(path, notice):
        if path.is_dir():
            if not (problems := verify(path)):
                os.utime(path)
                return path
            notice(f"{path}: damaged ({'; '.join(problems)}); creating the entry again")
            shutil.rmtree(path)
        with atomic_directory(path, durable=False) as tmp:
            write(tmp)
    return path


def find_cached(kind: str, key: str) -> Path | None:
    path = _entry_path(kind, key)
    if not path.is_dir() or verify(path):
        return None
    os.utime(path)
    return path


def _entry_path(kind: str, key: str) -> Path:
    name = sha256(f"{version('lorafold')}\n{key}".encode()).hexdigest()[:32]
    return cache_directory() / kind / name


def entries() -> list[CacheEntry]:
    """Returns entries and leftovers of killed processes, sorted by kind, the most recently used
    first.
    """
    found = []
    for kind in KINDS:
        for path in (cache_directory() / kind).glob("*"):
            if path.is_dir() and (path.name[0] != "." or is_abandoned(path.name)):
                files = [p.stat() for p in path.rglob("*") if p.is_file()]
                size, used = sum(f.st_size for f in files), path.stat().st_mtime
                found.append(CacheEntry(kind, path, size, used))
    return sorted(found, key=lambda e: (e.kind, -e.used))


def clear(chosen: Iterable[CacheEntry]) -> list[CacheEntry]:
    """Removes entries. Skips entries that a process is creating, and returns them. Processes that
    have an entry's files open keep their data.
    """
    busy = []
    for entry in chosen:
        lock = FileLock(str(entry.path.with_name(entry.path.name + LOCK)))
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(entry.path)
        except Timeout:
            busy.append(entry)
        except OSError as error:
            raise LorafoldError(f"{entry.path}: can't be removed: {error.strerror}") from error
    return busy


@contextmanager
def _locked(path: Path, notice: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(str(path.with_name(path.name + LOCK)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            notice(f"waiting for another process to create {path}")
            lock.acquire()
    except OSError as error:
        raise LorafoldError(
            f"{path.parent}: can't be written: {error.strerror}; set LORAFOLD_CACHE to another"
            " directory"
        ) from error
    try:
        yield
    finally:
        lock.release()
