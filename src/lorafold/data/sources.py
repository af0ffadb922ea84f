"""Where rows come from: a file, all files of a directory or that match a pattern, or a dataset of
the Hugging Face hub or that `datasets` saved.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorafold.data.folders import Files, files_of, is_pattern, shown
from lorafold.data.parsing import Found, Row
from lorafold.data.readers import KINDS, kind_of_file, numbered
from lorafold.data.text import AS_CSV, Tell
from lorafold.errors import LorafoldError, shortened
from lorafold.files.paths import beside
from lorafold.machine.hub import asked_once

__all__ = ["Row", "Source", "source_from"]

log = logging.getLogger(__name__)
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods")
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf|nan"


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how often an epoch goes through them."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"

    @property
    def several(self) -> bool:
        """Whether it is made of files that the user did not name one by one."""
        return is_pattern(self.name) or (self._path.is_dir() and not _saved(self._path))

    @cached_property
    def files(self) -> "tuple[Source, ...]":
        """The files that it is made of, in their order; itself, if it is one file or a dataset.

        Raises LorafoldError for a directory or a pattern without files of rows.
        """
        if not self.several:
            return (self,)
        return tuple(Source(str(path), self.weight) for path in self._files.paths)

    def told(self, counts: Mapping[str, int] | None = None) -> str:
        """Which files it is made of, and which it leaves out.

        Args:
            counts: The rows of each file, by its name.
        """
        names = [Path(file.name) for file in self.files]
        if self._path.is_dir():
            names = [name.relative_to(self._path) for name in names]
        numbers = [""] * len(names) if counts is None else [f" {n:,} rows" for n in counts.values()]
        files = shown(f"{name}{number}" for name, number in zip(names, numbers, strict=True))
        out = f"; left out: {self._files}" if self._files.left_out else ""
        return f"{len(names):,} files: {files}{out}"

    @property
    def size(self) -> int:
        """The bytes of its rows, as they are stored; 0 where it can't be read."""
        if self.several:
            return sum(file.size for file in self.files)
        if not self._is_file:
            return int(self._dataset.data.nbytes)
        return self._path.stat().st_size if self._path.is_file() else 0

    @property
    def identity(self) -> str:
        """What tells whether its rows are still the same: the digests of files, or the fingerprint
        of a dataset.
        """
        from lorafold.files.contents import of_file  # not needed by `--help`, which reads this file

        if self.several:
            return " ".join(file.identity for file in self.files)
        kind = "".join(self._path.suffixes[-2:]).lower()
        return f"{kind} {of_file(self._path)[1]}" if self._is_file else self._dataset._fingerprint

    def numbered(self, tell: Tell | None = None) -> Iterable[tuple[int, Found]]:
        """The numbered rows of a file or dataset, unchecked. LorafoldError where they can't be
        read.

        Args:
            tell: Is told in which encoding a file is, where that was guessed; None: the log is.
        """
        if self._is_file:
            return numbered(self._path, tell or self._log)
        return enumerate(self._dataset, 1)

    def streamed(self) -> Iterable[tuple[int, Found]]:
        """The numbered rows, without a copy of a dataset. LorafoldError where they can't be read.
        """
        if self._is_file:
            return numbered(self._path, self._log)
        return enumerate(_dataset(self.name, self._path, streaming=True), 1)

    def _log(self, told: str) -> None:
        log.warning("%s: %s", self.name, told)

    @property
    def _path(self) -> Path:
        return Path(self.name)

    @property
    def _is_file(self) -> bool:
        return not self._path.is_dir() and kind_of_file(self._path) is not None

    @cached_property
    def _files(self) -> Files:
        return files_of(self.name)

    @cached_property
    def _dataset(self) -> Any:
        return _dataset(self.name, self._path)


def source_from(text: str) -> Source:
    """The source that a user names: a file, directory or hub dataset, with `:WEIGHT` or without.

    Raises LorafoldError for a weight that is not above 0.
    """
    text = os.path.expanduser(text)
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists() or not re.fullmatch(NUMBER, weight.lower()):
        return Source(text)
    if not 0 < float(weight) < float("inf"):
        raise LorafoldError(f"--data {text}: found weight {weight}, expected a number above 0")
    return Source(name, float(weight))


def _dataset(source: str, path: Path, streaming: bool = False) -> Any:
    local = path.exists()
    if path.is_file() and path.suffix.lower() in SPREADSHEETS:
        raise LorafoldError(f"{source}: found a spreadsheet, expected rows; {AS_CSV}")
    if path.is_file() or (not local and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)):
        found = f"a {path.suffix or 'nameless'} file" if local else "no such file or directory"
        near = "" if local else beside(path)
        expected = near or f", expected {KINDS}, a directory or a hub dataset"
        raise LorafoldError(f"{source}: found {found}{expected}")
    from datasets import load_dataset, load_from_disk
    from datasets.config import HF_DATASETS_CACHE
    from datasets.exceptions import DatasetsError

    away, near = "", "" if local else beside(path)
    try:
        if local:
            found = load_from_disk(source)
        else:
            with asked_once() as away:
                found = load_dataset(source, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = shortened((str(error) or type(error).__name__).splitlines()[0], 150)
        reason = f"{away}, and it is not in {HF_DATASETS_CACHE}" if away else reason
        what = (
            "can't be read"
            if local
            else "there is no such file, and it can't be loaded as a hub dataset"
        )
        raise LorafoldError(f"{source}: {what}: {reason}{near}") from error
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) != 1:
        raise LorafoldError(
            f"{source}: found the splits {', '.join(found)}; expected only one, or one named train"
        )
    return found["train"] if "train" in found else next(iter(found.values()))


def _saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote a directory."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()
