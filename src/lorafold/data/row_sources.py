"""Sources of rows: a file, a directory, a glob pattern, or a dataset from the Hugging Face Hub or
`save_to_disk`.

Files are sorted by name, with numbers by value: part-2 before part-10. If a directory has a `train`
split, other splits are left out.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

from lorafold.data.exports import Numbered
from lorafold.data.json_input import json_type
from lorafold.data.readers import CSV_HINT, EXPORT, SUPPORTED, Warn, file_format, read_numbered
from lorafold.errors import LorafoldError, listed, truncate_middle
from lorafold.files.paths import nearest_name

log = logging.getLogger(__name__)
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?inf|nan"
MAX_LISTED = 10  # files that one line lists
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
METADATA = ("dataset_info.json", "dataset_infos.json")  # written by `datasets`
BY_NAME = (".txt", ".zip")  # read only if the user names the file


class Reading(NamedTuple):
    """How to read rows: lorafold's names of columns, for example {"prompt": "question"}, the
    assistant in a chat, and the encoding of text.
    """

    columns: Mapping[str, str] = {}
    me: str = ""
    encoding: str = ""


AS_IS = Reading()


class RowFiles(NamedTuple):
    paths: list[Path]
    left_out: dict[str, str]

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{list_names(names)} ({reason})" for reason, names in by_reason.items())


def is_pattern(name: str) -> bool:
    return has_magic(name) and not Path(name).exists()


def find_files(name: str) -> RowFiles:
    """Lists the files of a directory or a glob pattern. If a directory has a training split, the
    files of other splits are left out.
    """
    directory, matched = Path(name), is_pattern(name)
    if matched:
        names = {Path(path): path for path in glob(name, recursive=True)}
    else:
        names = {path: path.relative_to(directory).as_posix() for path in directory.rglob("*")}
        # hidden files, for example in .git, are reported only if they could contain rows
        names = {p: n for p, n in names.items() if not _hidden(n) or file_format(p)}
    splits = {}
    directories = [n for path, n in names.items() if path.is_dir() and matched and "**" not in name]
    left_out = dict.fromkeys(directories, "a directory")
    for path in sorted(filter(Path.is_file, names), key=_natural_key):
        file = names[path]
        if not matched and _hidden(file):
            left_out[file] = "hidden"
        elif path.name in METADATA:
            left_out[file] = "metadata of a dataset"
        elif not file_format(path) or (not matched and path.suffix.lower() in BY_NAME):
            left_out[file] = "unsupported format"
        else:
            words = () if matched else re.split(r"[^a-z]+", file.lower())
            splits_named = [SPLITS[word] for word in words if word in SPLITS]
            splits[path] = "train" if "train" in splits_named else (splits_named or [""])[0]
    if not matched and (chats := {path: "" for path in splits if EXPORT.search(path.name)}):
        rest = [path for path in splits if path not in chats]
        left_out |= {names[path]: "not the conversations of the export" for path in rest}
        splits = chats
    known = sorted({*splits.values()})
    if "train" in known:
        others = [path for path, split in splits.items() if split not in ("train", "")]
        left_out |= {names[path]: "another split; to use it, give the file" for path in others}
        splits = {path: split for path, split in splits.items() if path not in others}
    elif len(known) > 1 and "" not in known:
        raise LorafoldError(
            f"{name}: found the splits {listed(known)}, expected only one, or one named"
            f" train; select a split with a pattern such as {directory / f'*{known[0]}*'}"
        )
    if not splits:
        others_found = f" ({RowFiles([], left_out)})" if left_out else ""
        what = "no file that matches" if matched else "no file of rows"
        raise LorafoldError(f"{name}: found {what}{others_found}, expected {SUPPORTED}")
    return RowFiles([*splits], left_out)


def list_names(names: Iterable[str]) -> str:
    first = list(names)
    more = f" and {len(first) - MAX_LISTED:,} more" if len(first) > MAX_LISTED else ""
    return ", ".join(first[:MAX_LISTED]) + more


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__")) for part in name.split("/"))


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    pieces = re.split(r"([0-9]+)", path.as_posix().casefold())
    return [int(p) if n % 2 else p for n, p in enumerate(pieces)], str(path)


@dataclass(frozen=True)
class DataSource:
    """A source of rows, how to read it, and how often an epoch uses each row on average (`weight`).
    """

    name: str
    weight: float = 1.0
    reading: Reading = AS_IS

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.name}:{self.weight:g}"

    @property
    def is_multiple(self) -> bool:
        saved = ("state.json", "dataset_dict.json")  # written by `save_to_disk`
        return is_pattern(self.name) or (
            self._path.is_dir() and not any((self._path / name).exists() for name in saved)
        )

    @cached_property
    def files(self) -> tuple[DataSource, ...]:
        if not self.is_multiple:
            return (self,)
        return tuple(replace(self, name=str(path)) for path in self._files.paths)

    def describe(self, counts: Mapping[str, int] | None = None) -> str:
        names = [Path(file.name) for file in self.files]
        if self._path.is_dir():
            names = [name.relative_to(self._path) for name in names]
        numbers = [f" {n:,} rows" for n in counts.values()] if counts else [""] * len(names)
        files = list_names(f"{name}{number}" for name, number in zip(names, numbers, strict=True))
        out = f"; left out: {self._files}" if self._files.left_out else ""
        return f"{len(names):,} files: {files}{out}"

    @property
    def size(self) -> int:
        if self.is_multiple:
            return sum(file.size for file in self.files)
        if not self._is_file:
            return int(self._dataset.data.nbytes)
        return self._path.stat().st_size if self._path.is_file() else 0

    @property
    def identity(self) -> str:
        """The digests of files, or the fingerprint of a dataset."""
        # imported late to keep `--help` fast, which imports this file
        from lorafold.files.contents import file_digest

        if self.is_multiple:
            return " ".join(file.identity for file in self.files)
        kind = "".join(self._path.suffixes[-2:]).lower()
        read_as = f" {self.reading}" if any(self.reading) else ""
        if not self._is_file:
            return f"{self._dataset._fingerprint}{read_as}"
        return f"{kind} {file_digest(self._path)[1]}{read_as}"

    def numbered_rows(self, warn: Warn = log.warning, streaming: bool = False) -> Numbered:
        """Yields unchecked rows with their numbers. `streaming` avoids a copy of a dataset. `warn`
        receives messages about guesses and about what is left out.
        """
        columns, me, encoding = self.reading
        if self._is_file:
            rows = read_numbered(self._path, lambda s: warn(f"{self.name}: {s}"), encoding, me)
        else:
            data = _dataset(self.name, self._path, True) if streaming else self._dataset
            rows = enumerate(data, 1)
        return rename_columns(rows, columns) if columns else rows

    @property
    def _path(self) -> Path:
        return Path(self.name)

    @property
    def _is_file(self) -> bool:
        return not self._path.is_dir() and file_format(self._path) is not None

    @cached_property
    def _files(self) -> RowFiles:
        return find_files(self.name)

    @cached_property
    def _dataset(self) -> Any:
        return _dataset(self.name, self._path)


def select_split(source: str, data: Any) -> Any:
    """Returns the train split of a dataset with splits, or its only one, and logs the others; other
    data is returned unchanged.
    """
    splits = data if isinstance(data, Mapping) else {}
    if not any(hasattr(split, "column_names") for split in splits.values()):
        return data
    if "train" not in splits and len(splits) != 1:
        raise LorafoldError(
            f"{source}: found the splits {', '.join(splits)}, expected only one, or one named"
            " train"
        )
    used = "train" if "train" in splits else next(iter(splits))
    if others := [name for name in splits if name != used]:
        log.warning("%s: using the split %s; left out: %s", source, used, ", ".join(others))
    return splits[used]


def numbered_rows(data: Any, source: str) -> Numbered:
    """Numbers rows given in Python: an iterable of rows, a table (Arrow, pandas, polars), a mapping
    of columns, or a dataset with splits.
    """
    number, data = 0, select_split(source, data)
    if isinstance(data, Mapping) and str in map(type, data.values()):
        raise LorafoldError(f"{source}: found a single row, expected a list of rows")
    try:
        if isinstance(data, Mapping) or hasattr(data, "__arrow_c_stream__"):
            import pyarrow as pa

            data = pa.table(data).to_pylist()  # NaN in a DataFrame becomes null
        for number, row in enumerate(data, 1):
            is_row = isinstance(row, dict)
            yield number, row if is_row else f"found {json_type(row)}, expected an object"
    except Exception as error:  # also of the user's generator
        at = f"reading row {number + 1}: " if number else ""
        reason = truncate_middle(" ".join(str(error).split()), 200)
        raise LorafoldError(f"{source}: {at}{type(error).__name__}: {reason}") from error


def parse_source(text: str, reading: Reading = AS_IS) -> DataSource:
    text = os.path.expanduser(text)
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists() or not re.fullmatch(NUMBER, weight.lower()):
        return DataSource(text, 1.0, reading)
    if not 0 < float(weight) < float("inf"):
        raise LorafoldError(
            f"--data {text}: found weight {weight}, expected a finite number above 0"
        )
    return DataSource(name, float(weight), reading)


def rename_columns(
    numbered: Iterable[tuple[int, Any]], columns: Mapping[str, str]
) -> Iterator[tuple[int, Any]]:
    """Renames `columns[name]` to `name`, and drops the column `name` if `columns[name]` is empty. A
    row that can't be converted becomes an error message.
    """
    names = {name: key for name, key in columns.items() if key}
    dropped = [name for name in columns if name not in names]
    given_names = [*names.values(), *dropped]
    for number, row in numbered:
        if not (columns and isinstance(row, dict)):
            yield number, row
        elif missing := [key for key in given_names if key not in row]:
            keys = listed(map(repr, row), max_chars=100) or "none"
            hint = f"; the row has {keys}{suggest_columns(names, row)}"
            if {*columns} <= {*row} and not dropped:
                swapped = ",".join(f"{key}={name}" for name, key in names.items())
                hint = f"; the order is NAME=COLUMN: --columns {swapped}"
            yield number, f"found no column {listed(map(repr, missing), max_chars=80)}{hint}"
        elif lost := [name for name in names if name in row and name not in given_names]:
            pairs = ", ".join(f"{name}={names[name]}" for name in lost)
            yield number, f"--columns {pairs}: the row already has a column {', '.join(lost)}"
        else:
            rest = {key: value for key, value in row.items() if key not in given_names}
            yield number, rest | {name: row[key] for name, key in names.items()}


def suggest_columns(names: Mapping[str, str], row: Mapping[str, Any]) -> str:
    nearest = {
        name: key if key in row else next(iter(get_close_matches(key, map(str, row), 1)), "")
        for name, key in names.items()
    }
    columns = ",".join(f"{name}={key}" for name, key in nearest.items())
    return f"; did you mean --columns {columns}?" if nearest and all(nearest.values()) else ""


def _dataset(source: str, path: Path, streaming: bool = False) -> Any:
    local = path.exists()
    near = "" if local else nearest_name(path)
    if path.is_file() and path.suffix.lower() in (".xls", ".ods"):
        raise LorafoldError(f"{source}: found a spreadsheet, expected rows; {CSV_HINT}")
    if path.is_file() or (not local and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)):
        kind = f"a {path.suffix or 'suffixless'} file" if local else "no such file or directory"
        expected = near or f", expected {SUPPORTED}, a directory or a hub dataset"
        raise LorafoldError(f"{source}: found {kind}{expected}")
    from datasets import load_dataset, load_from_disk
    from datasets.config import HF_DATASETS_CACHE
    from datasets.exceptions import DatasetsError

    from lorafold.models.sources import offline_if_unreachable

    offline = ""
    try:
        if local:
            dataset = load_from_disk(source)
        else:
            with offline_if_unreachable() as offline:
                dataset = load_dataset(source, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        reason = truncate_middle((str(error) or type(error).__name__).splitlines()[0], 150)
        reason = f"{offline}, and the dataset is not in {HF_DATASETS_CACHE}" if offline else reason
        what = "there is no such file, and loading a hub dataset of this name fails"
        what = "can't be read" if local else what
        raise LorafoldError(f"{source}: {what}: {reason}{near}") from error
    return select_split(source, dataset)
