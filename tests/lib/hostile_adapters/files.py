"""Files that are none: links, pipes, devices, directories, gigabytes of nothing."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from hostile_adapters.case import CONFIG, GOOD, RECORD, WEIGHTS, cases, either, instead, wrong

cases("file", {
    "link": (
        "Weights that are a link to a file of the machine's.",
        lambda at: instead(at, WEIGHTS, lambda file: file.symlink_to("/etc/passwd")),
    ),
    "loop": (
        "A link to itself.", lambda at: instead(at, WEIGHTS, lambda file: file.symlink_to(WEIGHTS))
    ),
    "hard-link": (
        "Weights that are another adapter's file.",
        lambda at: instead(at, WEIGHTS, lambda file: os.link(at.parent / GOOD / "README.md", file)),
    ),
    "pipe": ("A pipe, whose reader waits for ever.", lambda at: instead(at, RECORD, os.mkfifo)),
    "pipe-weights": ("The same for the weights.", lambda at: instead(at, WEIGHTS, os.mkfifo)),
    "pipe-manifest": (
        "The same for the manifest.", lambda at: instead(at, "manifest.json", os.mkfifo)
    ),
    "pipe-tokenizer": (
        "The same for the tokenizer.", lambda at: instead(at, "tokenizer_config.json", os.mkfifo)
    ),
    "config-pipe": (
        "A pipe where the configuration is expected.", lambda at: instead(at, CONFIG, os.mkfifo)
    ),
    "sparse": ("Weights of 5 GB of nothing.", lambda at: os.truncate(at / WEIGHTS, 5 << 30)),
    "sparse-within": (
        "Weights of 3 GB, which a limit lets through, after tensors that are right.",
        lambda at: os.truncate(at / WEIGHTS, 3 << 30),
    ),
    "directory": (
        "A directory where weights are expected.", lambda at: instead(at, WEIGHTS, Path.mkdir)
    ),
    "config-directory": (
        "A directory where the configuration is expected.",
        lambda at: instead(at, CONFIG, Path.mkdir),
    ),
})  # fmt: skip
cases("file", {
    "dangling": (
        "A link to nothing, beside files that are right.",
        lambda at: (at / "notes.txt").symlink_to("nowhere"),
    ),
    "unreadable": ("Weights that nobody may read, but root.", lambda at: (at / WEIGHTS).chmod(0)),
    "directory-record": (
        "A directory where the record is expected.", lambda at: instead(at, RECORD, Path.mkdir)
    ),
}, told=False)  # fmt: skip


@wrong
def file_device(at: Path) -> None:
    """A device that gives zeros without end, or what takes its place without the rights."""
    (at / RECORD).unlink()
    try:
        os.mknod(at / RECORD, 0o020644, os.makedev(1, 5))
    except OSError:
        (at / RECORD).symlink_to("/dev/zero")


@wrong
def file_socket(at: Path) -> None:
    """A socket."""
    (at / RECORD).unlink()
    here = os.getcwd()
    os.chdir(at)  # an address is short
    try:
        socket.socket(socket.AF_UNIX).bind(RECORD)
    finally:
        os.chdir(here)


@wrong
def file_sparse_tokenizer(at: Path) -> None:
    """A tokenizer of 3 GB."""
    (at / "tokenizer_config.json").write_text("{}")
    (at / "tokenizer.json").touch()
    os.truncate(at / "tokenizer.json", 3 << 30)


@either
def file_many(at: Path) -> None:
    """Twenty thousand other files beside the adapter's."""
    for i in range(20_000):
        (at / f"{i}").touch()


@either
def name_newline(at: Path) -> None:
    """Names that write lines of a log, are no UTF-8, begin with a dash, or are very long."""
    for name in (b"a\n12:00 served", b"\xff\xfe", b"-rf", b"n" * 200, "\u202e".encode()):
        shutil.copytree(os.fsencode(at), os.fsencode(at.parent) + b"/" + name)
