"""The adapters' directory: which of its entries may be read as adapters, and what they say.

Only `DIR/NAME` is ever read, where NAME comes from the directory's own listing and not from a
client. Entries that lead outside, or have files that another name leads to as well, are refused:
whoever may write one adapter could else replace, or borrow, another one's files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorafold.core.attach import Origin
from lorafold.engine.adapters import found_below
from lorafold.errors import LorafoldError
from lorafold.files.atomic import MANIFEST
from lorafold.files.contents import Contents
from lorafold.files.record import read_record
from lorafold.models.loading import TOKENIZER_FILES, VOCABULARIES
from lorafold.models.tokenizer import FILES as TOKENIZER
from lorafold.models.tokenizer import has_tokenizer
from lorafold.peft.config import CONFIG, read_config
from lorafold.peft.directory import FILES
from lorafold.peft.stack import parse
from lorafold.translating.peft_config import name_of

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
MOST, PAGE = 4 << 30, 32 << 20  # bytes of one file of an adapter, and of its page


@dataclass(frozen=True)
class Found:
    """An adapter's files: where they are, the digest of their content, and what they say it is."""

    name: str
    path: Path
    digest: str
    method: str
    rank: int | None

    @property
    def key(self) -> str:
        """The name of this version."""
        return f"{self.name}@{self.digest[:12]}"


class Directory:
    """A directory of adapters, or one adapter. Raises LorafoldError if there is none.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise LorafoldError(f"--adapters {path}: found no directory, expected one")
        self._single = _has_config(path)

    def names(self) -> Iterator[str]:
        """The names of all entries that look like adapters; hidden ones are left alone."""
        if self._single:
            yield self.path.resolve().name
            return
        for entry in sorted(self.path.iterdir()):
            if not entry.name.startswith(".") and _has_config(entry):
                yield entry.name

    @property
    def beside(self) -> Path:
        """Where files may lie that are about the adapters and no adapter's own."""
        return self.path.parent if self._single else self.path

    def others(self) -> list[str]:
        """The names of directories that are no adapters."""
        if self._single:
            return []
        return sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.is_dir() and not entry.name.startswith(".") and not _has_config(entry)
        )

    def find(self, name: str) -> Found:
        """The adapter of a name. Raises LorafoldError if it can't be one."""
        path = self.locate(name)
        contents = Contents(path, FILES)
        contents.check_intact()
        if CONFIG not in contents.files:
            raise LorafoldError(f"found no {CONFIG}, expected the directory of an adapter")
        for origin in parse(contents.record):
            self._below(origin, path)
        spec = read_config(contents.object(CONFIG))[0]
        rank = getattr(spec, "rank", None) or getattr(getattr(spec, "over", None), "rank", None)
        return Found(name, path, contents.digest, name_of(spec), rank)

    def tokenizer(self, name: str) -> Contents | None:
        """The files of an adapter's own tokenizer, or else that of the highest one below it that
        has one, if there is one. Raises as `locate` does, and for damaged files.
        """
        path = self.locate(name)
        if not has_tokenizer(path):
            over = (self._below(origin, path) for origin in reversed(parse(read_record(path))))
            found = next(filter(has_tokenizer, over), None)
            if found is None:
                return None
            path = found
        there = {file for p in (*TOKENIZER_FILES, *VOCABULARIES) for file in path.glob(p)}
        files = sorted({*there, *(path / known for known in TOKENIZER)})
        self._check_own(*files)
        contents = Contents(path, [str(file.relative_to(path)) for file in files])
        contents.check_intact()
        return contents

    def page(self, name: str) -> Path | None:
        """The page that `lorafold inspect --html` wrote beside an adapter, as NAME.html."""
        file = self.beside / f"{name}.html"
        if file.is_symlink() or not file.is_file():
            return None
        about = file.stat()
        return file if about.st_nlink == 1 and about.st_size <= PAGE else None

    def locate(self, name: str) -> Path:
        """Where an adapter is. Raises LorafoldError for a name that leads nowhere, or elsewhere."""
        if not NAME.fullmatch(name):
            raise LorafoldError(
                f"name: found {name[:80]!r}, expected up to 64 letters, digits and . _ -"
            )
        if name not in self.names():
            raise LorafoldError(f"found no adapter {name}, expected one of the directory's")
        path = self.path if self._single else self.path / name
        self._check_own(path, *(path / each for each in (*FILES, MANIFEST)))
        return path

    def _below(self, origin: Origin, path: Path) -> Path:
        """Where an adapter is that the one at `path` lies over. Raises LorafoldError unless it is
        one of the directory's, with the digest that the record says.
        """
        if not self._single:
            self.locate(Path(origin.path).name)
        return found_below(origin, path).path

    def _check_own(self, *files: Path) -> None:
        """Raise LorafoldError for a file that is not the directory's own."""
        root = self.path.resolve()
        for file in files:
            if not os.path.lexists(file):
                continue
            if not (file.is_file() or file.is_dir()):
                raise LorafoldError(f"{file.name}: found neither a file nor a directory")
            if self._single:
                continue
            if root not in file.resolve().parents:
                raise LorafoldError(f"{file.name} is a link that leads outside of {self.path}")
            about = file.stat()
            if not file.is_dir() and (about.st_nlink > 1 or about.st_size > MOST):
                raise LorafoldError(
                    f"{file.name}: found {about.st_nlink} links and {about.st_size:,} bytes,"
                    f" expected one link and at most {MOST:,} bytes; copy it"
                )


def _has_config(path: Path) -> bool:
    return os.path.exists(path / CONFIG)
