"""Directories that are written completely or not at all.

    with atomic_directory("out", overwrite=False) as tmp:
        save_file(tensors, tmp / "model.safetensors")

The block writes to a temporary sibling on the same file system. On success the sibling gets a
manifest (sha256 and size of every file), everything is flushed to the disk, and one rename puts it
in place; on failure it is removed. A killed process leaves its temporary sibling, which the next
attempt at the same target removes. Use it for everything that lorafold writes permanently.

`check_intact` compares the files that a caller is about to read with manifest.json. Directories
without a manifest, or with another program's, are not checked.
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

from lorafold.errors import LorafoldError, as_one
from lorafold.files.paths import check_name

MANIFEST = "manifest.json"
HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # in the names of what is being written


@contextmanager
def atomic_directory(
    path: str | Path, overwrite: bool = False, durable: bool = True
) -> Iterator[Path]:
    """Yield an empty directory that becomes `path` when the block ends without an error.

    Args:
        path: The directory.
        overwrite: Replace one that lorafold wrote before; it stays until the new one is complete.
        durable: Flush everything to the disk. What can be made again need not be: `verify` tells if
            a power cut left it torn.

    Raises LorafoldError as `check_out` does, and if files can't be written (a full
    disk, no permission).
    """
    check_out(path, overwrite)
    target = Path(path).expanduser().resolve()
    absent = [folder for folder in target.parents if not folder.exists()]
    with _writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = _sibling(target, "partial")
        tmp.mkdir()
        try:
            yield tmp
            _place(tmp, target, overwrite, durable)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            with suppress(OSError):  # what another process wrote there meanwhile stays
                for folder in absent:
                    folder.rmdir()
            raise


def check_out(path: str | Path, overwrite: bool = False) -> None:
    """Raise LorafoldError unless `path` is free, or `overwrite` may replace it, and it can be
    written.

    Call it before any work is done. It removes what killed runs left beside `path`. A directory
    with files but without a manifest is never replaced, since lorafold did not write it.
    """
    target = Path(path).expanduser()
    check_name(path)
    _try(path, target.resolve().parent)
    with _writing(path):
        clear_leftovers(target.resolve())
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise LorafoldError(f"{path} exists and is not a directory; remove it yourself")
    if not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise LorafoldError(
            f"{path} holds files that lorafold did not write (it has no {MANIFEST}); choose"
            " another name, or remove it yourself"
        )
    if not overwrite:
        raise LorafoldError(f"{path} exists; pass --overwrite to replace it")


def check_folder(path: str | Path) -> None:
    """Raise LorafoldError unless files can be written into a directory, which need not exist yet.

    Call it before any work is done whose results are added to the directory one by one.
    """
    _try(path, Path(path).expanduser().resolve())


def check_file(path: str | Path) -> None:
    """Raise LorafoldError unless a file can be written, which `write_text` then does. Call it
    before any work is done.
    """
    target = Path(path).expanduser().resolve()
    _check_no_directory(path)
    if not target.parent.is_dir():
        raise LorafoldError(f"{path} can't be written: found no directory {target.parent}")
    _try(path, target.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write the value as indented JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises LorafoldError if it is not a JSON object."""
    return as_object(path.read_bytes(), path)


def as_object(content: bytes | bytearray, path: Path) -> dict[str, Any]:
    """The content of a JSON file, as `read_object`; `path` is for the message."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise LorafoldError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LorafoldError(f"{path}: found {type(value).__name__}, expected an object")
    return value


def write_text(path: str | Path, text: str) -> None:
    """Write a file, replacing an old one in one step. Raises LorafoldError if that fails."""
    _check_no_directory(path)
    target = Path(path).resolve()
    with _writing(path):
        tmp = _sibling(target, "partial")
        try:
            tmp.write_text(text, encoding="utf-8")
            _sync(tmp)
            tmp.replace(target)
            _sync(target.parent)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


def verify(path: str | Path, patterns: Sequence[str] = ("*",)) -> list[str]:
    """Compare a directory with its manifest; return one line for each file that is missing or has
    another size or content.

    Only the manifest's files that match one of the shell patterns are compared (`*` matches across
    folders too). Files that were added are ignored.
    """
    root = Path(path)
    try:
        manifest = (root / MANIFEST).read_bytes()
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except OSError:
        return [f"{MANIFEST}: not readable as a manifest"]
    return compare(root, manifest, patterns)


def compare(
    root: Path,
    manifest: bytes | bytearray,
    patterns: Sequence[str],
    read: Mapping[str, tuple[int, str]] | None = None,
) -> list[str]:
    """Compare files with a manifest, as `verify` does.

    Args:
        root: the directory.
        manifest: the content of the manifest.
        patterns: shell patterns of the files to compare.
        read: (bytes, SHA-256 in hexadecimal) by name, if the files were read already; None
            compares those on the disk.
    """
    try:
        files = json.loads(manifest)["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: not readable as a manifest"]
    problems = []
    for name, (size, digest) in expected.items():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        file = root / name
        if read is None:  # its content counts if it has the size
            found = (file.stat().st_size, "") if file.is_file() else None
        else:
            found = read.get(name)
        if found is None:
            problems.append(f"{name}: missing")
        elif found[0] != size:
            problems.append(f"{name}: {found[0]} bytes, expected {size}")
        elif (found[1] or sha256(file)) != digest:
            problems.append(f"{name}: content differs from the manifest")
    return problems


def sha256(path: Path) -> str:
    """The SHA-256 of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_abandoned(name: str) -> bool:
    """Tell from the name of a file or directory whether a process of this machine was killed while
    it wrote it.
    """
    found = re.fullmatch(rf"\..+\.{HOST}-(\d+)-[0-9a-f]+\.(partial|old)", name)
    return found is not None and not psutil.pid_exists(int(found[1]))


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Turn errors of the file system and of safetensors into a LorafoldError of one line."""
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
        raise LorafoldError(f"{path}: found a directory, expected the name of a file")


def _try(path: str | Path, folder: Path) -> None:
    """Raise LorafoldError, which names `path`, if nothing can be made in a folder, or nowhere above
    it if it does not exist yet. What can be made is found by making it.
    """
    there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    try:
        made = _sibling(there / Path(path).name, "partial")
        made.mkdir()
        made.rmdir()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise LorafoldError(f"{path} can't be written: {there}: {reason}") from error


def _place(tmp: Path, target: Path, overwrite: bool, durable: bool) -> None:
    """Write the manifest and, if it shall be durable, flush all files and directories; then rename
    `tmp` to `target`.

    At every moment `target` is the old directory, absent, or the new one.
    """
    files = sorted(p for p in tmp.rglob("*") if p.is_file())
    for path in files:  # safetensors writes those that their owner alone can read
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
    if not target.exists():
        tmp.rename(target)
        _sync(target.parent)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        tmp.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, kind: str) -> Path:
    """A hidden name beside `target` with the machine and the process that it belongs to."""
    return target.with_name(f".{target.name}.{HOST}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def remove(path: str | Path) -> None:
    """Remove a directory, if it is there, as far as that is possible. It is whole until it is gone,
    and what a killed process leaves goes with the next attempt.
    """
    target = Path(path).resolve()
    gone = _sibling(target, "partial")
    with suppress(OSError):
        target.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def clear_leftovers(target: Path) -> None:
    """Remove what dead processes of this machine left beside `target`, an absolute path. If one was
    killed between its two renames, the old directory is put back.
    """
    beside = list(target.parent.iterdir()) if target.parent.is_dir() else []
    for path in beside:
        if not (path.name.startswith(f".{target.name}.{HOST}-") and is_abandoned(path.name)):
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
    """Raise LorafoldError unless the files that match a pattern are as lorafold wrote them. Nothing
    is known of them where there is no manifest, or where another program wrote it: it has no
    "files".

    Args:
        manifest: its content; None reads it.
        read: the files that were read already, as `compare` takes them.
    """
    root = Path(directory)
    try:
        manifest = (root / MANIFEST).read_bytes() if manifest is None else manifest
        found = json.loads(manifest)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        manifest, found = b"", None  # which is compared as one that can't be read
    if isinstance(found, dict) and "files" not in found:
        return
    if problems := compare(root, manifest, patterns, read):
        raise LorafoldError(
            f"{directory}: {as_one(problems)}: damaged, or changed by hand; restore it, or"
            f" delete {MANIFEST} if you changed it yourself"
        )
