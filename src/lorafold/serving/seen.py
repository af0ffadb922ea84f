"""What is known of adapters that were verified once, kept between runs: a start reads none again.

An entry holds for as long as every file of the adapter, and of those below it, has the marks that
it had (`lorafold.files.contents`), for one base by its identity, whatever its name, and for the
code that verified it. Whoever reads an adapter compares its digest all the same.

`Digests` compares digests in today's form, and until lorafold 0.3 in the old one, which covers
configuration, weights, record and manifest but no tokenizer. A version without a manifest has no
old form of its own, so such a digest matches nothing; a quarantine holds.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_text
from lorafold.files.contents import Marks
from lorafold.serving.json_file import read

log = logging.getLogger(__name__)
SHOWN = 12  # digits in a line of the log
WON_T = "which lorafold 0.3 won't understand"
MAY_BE = "or of another version without a tokenizer, so that it stands for nothing now"


class Found(BaseModel):
    """An adapter's files: where they are, what they are by digest, and what they say it is.

    `digest` is its identity together with those of the adapters below, and `old` the digest of its
    own files without its tokenizer, by which versions were known before; `manifest` says whether
    there is one among these. `over` is where the
    adapters below are, the lowest first, and `stack` the identities of what is read of these and of
    it, of `sizes` in bytes. `base` is the base that it names where it has no fingerprint to tell
    by, `other_base` and `other_storage` how its base differs from the one that is served, `form`
    the digest of what adapters have in common that differ in nothing but their values, `tokenizer`
    the digest of its tokenizer, or "" for the base's, and `words` where that is. `note` is for the
    administrator.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: Path
    digest: str
    old: str
    manifest: bool
    stack: tuple[str, ...]
    sizes: tuple[int, ...] = ()  # what an older version kept has none, and is verified again
    over: tuple[Path, ...] = ()
    method: str
    rank: int | None = None
    base: str = ""
    other_base: str = ""
    other_storage: str = ""
    form: str = ""
    tokenizer: str = ""
    words: Path | None = None
    note: str = ""

    @property
    def key(self) -> str:
        """The name of this version."""
        return f"{self.name}@{self.digest[:12]}"


class SeenAdapter(BaseModel):
    """An adapter, and the marks that its files had, and those of the adapters below."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    found: Found
    marks: dict[str, Marks]


class SeenFile(BaseModel):
    """The content of the file; `identity` is that of the base and of the code."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: str
    adapters: dict[str, SeenAdapter] = {}


class Seen:
    """The adapters that were verified. Any thread may call it.

    Args:
        identity: what they were verified for.
    """

    def __init__(self, file: Path, identity: str) -> None:
        self.file, self.identity = file, identity
        self._lock, self._saving, self._changed = threading.Lock(), threading.Lock(), False
        self._failed, self._adapters = False, dict[str, SeenAdapter]()
        self.digests: dict[str, str] = {}  # that adapters had when they were last seen
        if os.path.lexists(file):
            try:
                content = read(file, SeenFile, "it is written anew")
            except LorafoldError as error:
                log.warning("adapters are verified again: %s", error)
                return
            self.digests = {name: one.found.digest for name, one in content.adapters.items()}
            for name, one in content.adapters.items():  # of another base the digest alone
                marks = one.marks if content.identity == identity else {}
                self._adapters[name] = SeenAdapter(found=one.found, marks=marks)

    def find(self, name: str) -> SeenAdapter | None:
        """What was found of the adapter of that name, and the marks that its files had, or none
        where it has to be verified again.
        """
        return self._adapters.get(name)

    def put(self, found: Found, marks: Mapping[str, Marks]) -> None:
        """Note an adapter that was verified, without the marks of files that were written just now:
        they could be written again without another one, and so are read again.
        """
        noted = dict(marks) if all(mark.settled for mark in marks.values()) else {}
        with self._lock:
            self._adapters[found.name] = SeenAdapter(found=found, marks=noted)
            self._changed = True

    def forms(self) -> set[str]:
        """The forms of all adapters."""
        return {entry.found.form for entry in self._adapters.values() if entry.marks}

    def save(self) -> None:
        """Write the file, if there is anything new."""
        with self._saving:  # an older content is not written over a newer one
            with self._lock:
                if not self._changed:
                    return
                self._changed = False
                content = SeenFile(identity=self.identity, adapters=dict(self._adapters))
            try:
                write_text(self.file, content.model_dump_json())
                self._failed = False
            except LorafoldError as error:
                if not self._failed:
                    log.warning("what was verified can't be kept yet: %s", error)
                self._changed = self._failed = True


class Digests:
    """Compares digests with those of one server's versions. Any thread may call it."""

    def __init__(self) -> None:
        self._told: set[str] = set()  # versions of which it was said

    def fit(self, found: Found, given: str, unsure: bool = False) -> bool:
        """Whether a digest, or the first digits of one, is that of a version, in either form.

        Args:
            given: the digits, as a client or the file of what is kept has them.
            unsure: what it is where it may be another version's.
        """
        if found.digest.startswith(given):
            return True
        if not found.old.startswith(given):
            return False
        if found.key not in self._told:
            self._told.add(found.key)
            log.warning(
                "%s@%s is a digest of the old form, %s; use %s",
                found.name, given[:SHOWN], WON_T if found.manifest else MAY_BE, found.key,
            )  # fmt: skip
        return found.manifest or unsure
