"""Atomic directories with a manifest.

A `with` block writes into a temporary directory next to the target. On success, the directory is
flushed and renamed to the target; on failure, it is removed. If the process was killed, the next
attempt removes its temporary directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import psutil

from lorafold.errors import LorafoldError, join_problems
from lorafold.files.paths import check_name

MANIFEST = "manifest.json"
HOST_ID = f"{zlib.crc32(platform.node().encode()):08x}"  # names this machine in temporary names


@contextmanager
def atomic_directory(
    path: str | Path, overwrite: bool = False, durable: bool = True
) -> Iterator[Path]:
    """Yields an empty directory that is renamed to `path` if the block succeeds. With `overwrite`,
    it may replace a directory that lorafold wrote. Reproducible content need not be `durable`
    (flushed), because `verify` detects files that a power failure truncated.
    """
    check_out(path, overwrite)
    target = Path(path).expanduser().resolve()
    absent = [folder for folder in target.parents if not folder.exists()]
    with write_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = _temporary(target, "partial")
        tmp.mkdir()
        try:
            yield tmp
            _publish(tmp, target, overwrite, durable)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            with suppress(OSError):  # another process may have written there
                for folder in absent:
                    folder.rmdir()
            raise


def check_out(path: str | Path, overwrite: bool = False) -> None:
    """Raises unless `path` can be written and is free or may be replaced. A directory that has
    files but no manifest may never be replaced, because lorafold did not write it. Also removes
    leftovers of killed runs.
    """
    target = Path(path).expanduser()
    check_name(path)
    _check_creatable(path, target.resolve().parent)
    with write_errors(path):
        clear_leftovers(target.resolve())
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise LorafoldError(f"{path} exists and is not a directory; remove the file yourself")
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise LorafoldError(
            f"{path} contains files that lorafold did not write (it has no {MANIFEST}); choose"
            " another name, or remove the directory yourself"
        )
    if not overwrite:
        raise LorafoldError(f"{path} exists; choose another name, or replace it with --overwrite")


def check_folder(path: str | Path) -> None:
    """Raises unless files can be created in the directory, which may not exist yet."""
    _check_creatable(path, Path(path).expanduser().resolve())


def check_file(path: str | Path) -> None:
    target = Path(path).expanduser().resolve()
    _check_no_directory(path)
    if not target.parent.is_dir():
        raise LorafoldError(f"{path} can't be written: {target.parent} is not a directory")
    _check_creatable(path, target.parent)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    return as_object(path.read_bytes(), path)


def as_object(content: bytes | bytearray, path: Path) -> dict[str, Any]:
    """Parses a JSON object. `path` appears in error messages only."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LorafoldError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically."""
    _check_no_directory(path)
    target = Path(path).resolve()
    with write_errors(path):
        tmp = _temporary(target, "partial")
        try:
            tmp.write_text(text, encoding="utf-8")
            _sync(tmp)
            tmp.replace(target)
            _sync(target.parent)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


def verify(
    path: str | Path,
    patterns: Sequence[str] = ("*",),
    manifest: bytes | bytearray | None = None,
    read: Mapping[str, tuple[int, str]] | None = None,
    required: bool = True,
) -> list[str]:
    """Compares the files that match a pattern with the manifest, and returns a line per difference.
    `manifest` is the manifest's content, and `read` the (bytes, SHA-256) of files, if the caller
    has read them. Unless `required`, the manifest may be missing, or be another program's file
    without "files".
    """
    root, problems = Path(path), []
    try:
        content = json.loads((root / MANIFEST).read_bytes() if manifest is None else manifest)
        if not required and isinstance(content, dict) and "files" not in content:
            return []
        expected = {
            name: (entry["size"], entry["sha256"]) for name, entry in content["files"].items()
        }
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"] * required
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: not readable as a manifest"]
    for name, (size, digest) in expected.items():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        file = root / name
        if read is not None:
            found = read.get(name)
        else:  # hashed below if the size is right
            found = (file.stat().st_size, "") if file.is_file() else None
        if found is None:
            problems.append(f"{name}: missing")
        elif found[0] != size:
            problems.append(f"{name}: {found[0]} bytes, expected {size}")
        elif (found[1] or sha256(file)) != digest:
            problems.append(f"{name}: content differs from the manifest")
    return problems


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_abandoned(name: str) -> bool:
    """Whether a dead process on this machine made this temporary name."""
    found = re.fullmatch(rf"\..+\.{HOST_ID}-(\d+)-[0-9a-f]+\.(partial|old)", name)
    return found is not None and not psutil.pid_exists(int(found[1]))


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise LorafoldError(f"{path} was not written: {error.strerror or error}{place}") from error
    except SafetensorError as error:
        raise LorafoldError(f"{path} was not written: {error}") from error


def _check_no_directory(path: str | Path) -> None:
    if Path(path).expanduser().is_dir():
        raise LorafoldError(f"{path}: found a directory, expected a file name")


def _check_creatable(path: str | Path, folder: Path) -> None:
    """Raises if nothing can be created in the folder or its nearest existing parent."""
    there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    try:
        made = _temporary(there / Path(path).name, "partial")
        made.mkdir()
        made.rmdir()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise LorafoldError(f"{path} can't be written: {there}: {reason}") from error


def _publish(tmp: Path, target: Path, overwrite: bool, durable: bool) -> None:
    """Writes the manifest, flushes and renames. At any moment, `target` is complete or absent."""
    files = sorted(p for p in tmp.rglob("*") if p.is_file())
    for path in files:  # safetensors creates files that only the owner can read
        if path.stat().st_nlink == 1:
            path.chmod(tmp.stat().st_mode & 0o666)
    entries = {
        p.relative_to(tmp).as_posix(): {"sha256": sha256(p), "size": p.stat().st_size}
        for p in files
    }
    write_json(tmp / MANIFEST, {"files": entries})
    if durable:
        for path in [*files, *(p for p in tmp.rglob("*") if p.is_dir()), tmp]:
            _sync(path)
    check_out(target, overwrite)
    old = _temporary(target, "old") if target.exists() else None
    if old is not None:
        target.rename(old)
    try:
        tmp.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _temporary(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{HOST_ID}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def remove(path: str | Path) -> None:
    """Renames a directory before removing it, so that it never appears incomplete."""
    target = Path(path).resolve()
    gone = _temporary(target, "partial")
    with suppress(OSError):
        target.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Removes leftovers of dead processes on this machine next to `target`, an absolute path.
    Restores the old directory if the process died between the two renames of `_publish`.
    """
    for path in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        if not (path.name.startswith(f".{target.name}.{HOST_ID}-") and is_abandoned(path.name)):
            continue
        if path.suffix == ".old" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_intact(
    directory: str | Path,
    patterns: Sequence[str],
    manifest: bytes | bytearray | None = None,
    read: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """Raises if files differ from lorafold's manifest. A directory may have no manifest."""
    if problems := verify(directory, patterns, manifest, read, required=False):
        raise LorafoldError(
            f"{directory}: {join_problems(problems)}: the files were damaged or edited; restore"
            f" them, or delete {MANIFEST} if you edited them"
        )
