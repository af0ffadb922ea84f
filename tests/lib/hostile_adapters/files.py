"""Files that are none: links, pipes, devices, directories, gigabytes of nothing."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from hostile_adapters.case import CONFIG, GOOD, RECORD, WEIGHTS, either, wrong


@wrong
def file_link(at: Path) -> None:
    """Weights that are a link to a file of the machine's."""
    (at / WEIGHTS).unlink()
    (at / WEIGHTS).symlink_to("/etc/passwd")


@wrong
def file_loop(at: Path) -> None:
    """A link to itself."""
    (at / WEIGHTS).unlink()
    (at / WEIGHTS).symlink_to(WEIGHTS)


@either
def file_dangling(at: Path) -> None:
    """A link to nothing, beside files that are right."""
    (at / "notes.txt").symlink_to("nowhere")


@wrong
def file_hard_link(at: Path) -> None:
    """Weights that are another adapter's file."""
    (at / WEIGHTS).unlink()
    os.link(at.parent / GOOD / "README.md", at / WEIGHTS)


@wrong
def file_pipe(at: Path) -> None:
    """A pipe, whose reader waits for ever."""
    (at / RECORD).unlink()
    os.mkfifo(at / RECORD)


@wrong
def file_pipe_weights(at: Path) -> None:
    """The same for the weights."""
    (at / WEIGHTS).unlink()
    os.mkfifo(at / WEIGHTS)


@wrong
def file_pipe_manifest(at: Path) -> None:
    """The same for the manifest."""
    os.mkfifo(at / "manifest.json")


@wrong
def file_pipe_tokenizer(at: Path) -> None:
    """The same for the tokenizer."""
    os.mkfifo(at / "tokenizer_config.json")


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
def file_sparse(at: Path) -> None:
    """Weights of 5 GB of nothing."""
    os.truncate(at / WEIGHTS, 5 << 30)


@wrong
def file_sparse_within(at: Path) -> None:
    """Weights of 3 GB, which a limit lets through, after tensors that are right."""
    os.truncate(at / WEIGHTS, 3 << 30)


@wrong
def file_sparse_tokenizer(at: Path) -> None:
    """A tokenizer of 3 GB."""
    (at / "tokenizer_config.json").write_text("{}")
    (at / "tokenizer.json").touch()
    os.truncate(at / "tokenizer.json", 3 << 30)


@either
def file_unreadable(at: Path) -> None:
    """Weights that nobody may read, but root."""
    (at / WEIGHTS).chmod(0)


@wrong
def file_directory(at: Path) -> None:
    """A directory where weights are expected."""
    (at / WEIGHTS).unlink()
    (at / WEIGHTS).mkdir()


@either
def file_directory_record(at: Path) -> None:
    """A directory where the record is expected."""
    (at / RECORD).unlink()
    (at / RECORD).mkdir()


@wrong
def file_config_directory(at: Path) -> None:
    """A directory where the configuration is expected."""
    (at / CONFIG).unlink()
    (at / CONFIG).mkdir()


@wrong
def file_config_pipe(at: Path) -> None:
    """A pipe where the configuration is expected."""
    (at / CONFIG).unlink()
    os.mkfifo(at / CONFIG)


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
