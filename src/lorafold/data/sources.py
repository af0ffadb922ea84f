"""Where rows come from: a JSONL, JSON, CSV or Parquet file, a directory, or a hub dataset.

A row that can't be read is handed on as the reason, so that all bad rows are told together. Rows
are numbered from 1: by line in a JSONL file, by record after the header in a CSV file.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorafold.errors import LorafoldError

Row = dict[str, Any]
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf|nan"
Found = Row | str  # a row, or the reason why it could not be read


@dataclass(frozen=True)
class Source:
    """Where rows come from, and how often an epoch goes through them."""

    name: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"

    @property
    def size(self) -> int:
        """The bytes of its rows, as they are stored; 0 where it can't be read."""
        if self._read is None:
            return int(self._dataset.data.nbytes)
        return self._path.stat().st_size if self._path.is_file() else 0

    @property
    def identity(self) -> str:
        """What tells whether its rows are still the same: the digest of a file, or the fingerprint
        of a dataset.
        """
        from lorafold.files.digests import of_file  # not needed by `--help`, which reads this file

        return of_file(self._path)[1] if self._read else str(self._dataset._fingerprint)

    def numbered(self) -> Iterable[tuple[int, Found]]:
        """The numbered rows, unchecked. LorafoldError where they can't be read."""
        return self._read(self._path) if self._read else enumerate(self._dataset, 1)

    def streamed(self) -> Iterable[tuple[int, Found]]:
        """The numbered rows, without a copy of a dataset. LorafoldError where they can't be read.
        """
        if self._read:
            return self._read(self._path)
        return enumerate(_dataset(self.name, self._path, streaming=True), 1)

    @property
    def _path(self) -> Path:
        return Path(self.name)

    @property
    def _read(self) -> Callable[[Path], Iterator[tuple[int, Found]]] | None:
        """What reads the rows of a file; None for a dataset."""
        return None if self._path.is_dir() else READERS.get(self._path.suffix)

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


def kind_of(value: Any) -> str:
    """What a JSON value is, for messages: text, a list, an object, or a number or null itself."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _json_rows(path: Path) -> Iterator[tuple[int, Found]]:
    try:
        if path.suffix == ".json" and path.read_bytes().lstrip()[:1] == b"[":
            for number, value in enumerate(json.loads(path.read_bytes()), 1):
                yield number, _an_object(value)
            return
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line.removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise LorafoldError(
            f"{path}: line {error.lineno}: not JSON: {error.msg} at column {error.colno}"
        ) from error


def _parse(line: bytes) -> Found:
    try:
        return _an_object(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1}"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"


def _an_object(value: Any) -> Found:
    return value if isinstance(value, dict) else f"found {kind_of(value)}, expected an object"


def _dataset(source: str, path: Path, streaming: bool = False) -> Any:
    local = path.exists()
    if path.is_file() or (not local and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)):
        found = f"a {path.suffix or 'nameless'} file" if local else "no such file or directory"
        raise LorafoldError(
            f"{source}: found {found}, expected {', '.join(READERS)}, a directory or a hub dataset"
        )
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = load_from_disk(source)  # the directory was written by save_to_disk
        else:
            found = load_dataset(source, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = (
            "can't be read"
            if local
            else "there is no such file, and it can't be loaded as a hub dataset"
        )
        raise LorafoldError(f"{source}: {what}: {reason}") from error
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) != 1:
        raise LorafoldError(
            f"{source}: found the splits {', '.join(found)}; expected only one, or one named train"
        )
    return found["train"] if "train" in found else next(iter(found.values()))


def _csv_rows(path: Path) -> Iterator[tuple[int, Found]]:
    """Rows under the names of the header; every value is text. A column without a name, such as
    the index that pandas writes, is called by its place: column 1.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            records = csv.DictReader(lines, strict=True)
            header = records.fieldnames or []
            names = [name if name.strip() else f"column {n}" for n, name in enumerate(header, 1)]
            records.fieldnames = names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise LorafoldError(
                    f"{path}: header: found {', '.join(map(repr, twice))} more than once, expected"
                    " each name once"
                )
            for number, record in enumerate(records, 1):
                extra = record.pop(None, None)
                given = sum(value is not None for value in record.values()) + len(extra or ())
                if given == len(names):
                    yield number, record
                else:
                    yield number, f"found {given} values, expected {len(names)} as in the header"
    except OSError as error:
        raise LorafoldError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LorafoldError(
            f"{path}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        ) from error
    except csv.Error as error:
        raise LorafoldError(f"{path}: not CSV after line {records.line_num}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Found]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            batches = file.iter_batches(1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (OSError, pa.ArrowInvalid) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise LorafoldError(f"{path}: can't be read: {reason}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Found]]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
