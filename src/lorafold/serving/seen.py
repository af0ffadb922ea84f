"""What is known of adapters that were verified once, kept between runs: a start reads none again.

An entry holds for as long as every file of the adapter has the marks that it had (device, inode,
size, and the times of its content and of its name), and for one base and one version of lorafold.
Whoever reads an adapter compares its digest all the same.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_text
from lorafold.serving.directory import FRESH, Mark
from lorafold.serving.json_file import read

log = logging.getLogger(__name__)


class Found(BaseModel):
    """An adapter's files: where they are, the digest of their content, and what they say it is.

    `base` is the base that they name, `form` the digest of what adapters have in common that differ
    in nothing but their values, and `tokenizer` the digest of a tokenizer of their own, or "".
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: Path
    digest: str
    method: str
    rank: int | None = None
    base: str = ""
    form: str = ""
    tokenizer: str = ""
    note: str = ""

    @property
    def key(self) -> str:
        """The name of this version."""
        return f"{self.name}@{self.digest[:12]}"


class Entry(BaseModel):
    """An adapter, and the marks that its files had."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    found: Found
    marks: tuple[Mark, ...]


class Content(BaseModel):
    """The content of the file; `identity` is that of the base and of lorafold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: str
    adapters: dict[str, Entry] = {}


class Seen:
    """The adapters that were verified. Any thread may call it.

    Args:
        file: where they are kept.
        identity: what they were verified for.
    """

    def __init__(self, file: Path, identity: str) -> None:
        self.file, self.identity = file, identity
        self._lock, self._changed = threading.Lock(), False
        self._adapters: dict[str, Entry] = {}
        self.digests: dict[str, str] = {}  # that adapters had when they were last seen
        if os.path.lexists(file):
            try:
                content = read(file, Content, "it is written anew")
            except LorafoldError as error:
                log.warning("adapters are verified again: %s", error)
                return
            self.digests = {name: one.found.digest for name, one in content.adapters.items()}
            if content.identity == identity:
                self._adapters = dict(content.adapters)

    def find(self, name: str, marks: tuple[Mark, ...]) -> Found | None:
        """The adapter of that name, if its files have these marks."""
        entry = self._adapters.get(name)
        return entry.found if entry is not None and entry.marks == marks else None

    def put(self, found: Found, marks: tuple[Mark, ...]) -> None:
        """Note an adapter that was verified. Files that were written just now are not noted: they
        could be written again without another mark.
        """
        old = max((max(mark.modified, mark.changed) for mark in marks), default=0)
        if time.time_ns() - old > FRESH * 1e9:
            with self._lock:
                self._adapters[found.name] = Entry(found=found, marks=marks)
                self._changed = True

    def forms(self) -> set[str]:
        """The forms of all adapters."""
        return {entry.found.form for entry in self._adapters.values()}

    def save(self) -> None:
        """Write the file, if there is anything new."""
        with self._lock:
            if not self._changed:
                return
            self._changed = False
            content = Content(identity=self.identity, adapters=dict(self._adapters))
        try:
            write_text(self.file, content.model_dump_json())
        except LorafoldError as error:
            log.warning("what was verified can't be kept: %s", error)
