"""Reads a user's rows, and checks that those of one file are well-formed and of one shape.

    rows = read_rows(["mine.jsonl", "other.jsonl:0.3"])       an epoch takes 0.3 of the second

Further keys are ignored, and `Rows.ignored` names them. One error message lists everything that is
wrong, each with its file, row (in a JSONL file the line, from 1), field, and what was found and
expected. Large data is checked once: its rows are kept in the cache, under the digest of the files.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafold.data.checking import checked, renamed
from lorafold.data.noticed import Noticed
from lorafold.data.origins import Origins
from lorafold.data.parsing import Row, as_row
from lorafold.data.shapes import Shape, shapes_for
from lorafold.data.sources import Source, source_from
from lorafold.data.stored import LARGE, ArrowRows, Part, Rows, write_rows
from lorafold.errors import LorafoldError
from lorafold.files.atomic import write_json
from lorafold.files.cache import cached

log = logging.getLogger(__name__)
Notice = Callable[[str], None]


class Reading:
    """The rows of sources as they are read, and what is known of them afterwards: `parts` and
    `files` as pairs of the number of a source and a count of rows, and the `runs` of `Origins` with
    the number of a file, of those of all sources.
    """

    def __init__(
        self, sources: Sequence[Source], columns: Mapping[str, str], wanted: str, notice: Notice
    ) -> None:
        self._sources, self._columns = sources, columns
        self._shapes, self._notice, self._noticed = shapes_for(wanted), notice, Noticed(wanted)
        self._parts, self._files = list[list[int]](), list[list[int]]()
        self._runs, self._guessed = list[list[int]](), list[str]()

    def __iter__(self) -> Iterator[Row]:
        """The rows. LorafoldError for bad ones, and for a source without any."""
        for number, source in enumerate(self._sources):
            last = None
            for file in source.files:
                self._files.append([number, 0])
                begins = True
                for place, shape, row in self._checked(file, source.several):
                    if shape is not last:  # files of one source and one shape are one part
                        self._parts.append([number, 0])
                        last = shape
                    if begins or place != sum(self._runs[-1][1:]):
                        self._runs.append([len(self._files) - 1, place, 0])
                        begins = False
                    self._runs[-1][2] += 1
                    self._parts[-1][1] += 1
                    self._files[-1][1] += 1
                    if self._files[-1][1] % 100_000 == 0:
                        self._notice(f"{file.name}: {self._files[-1][1]:,} rows read")
                    yield row
            if last is None:
                raise LorafoldError(f"{source.name}: no rows found, expected at least one")

    @property
    def about(self) -> dict[str, Any]:
        """What is known of the rows after the last one, as JSON."""
        noticed = self._noticed
        found = {"ignored": noticed.ignored, "told": noticed.told, "runs": self._runs}
        found["guessed"] = self._guessed
        return {"parts": self._parts, "files": self._files, **found}

    def _checked(self, file: Source, none: bool) -> Iterator[tuple[int, Shape, Row]]:
        def tell(text: str) -> None:
            self._guessed.append(f"{file.name}: {text}")

        numbered = renamed(file.numbered(tell), self._columns)
        noticed = self._noticed
        return checked(numbered, file.name, shapes=self._shapes, none=none, noticed=noticed)


def read_rows(
    sources: str | Sequence[str],
    columns: Mapping[str, str] | None = None,
    notice: Notice = lambda text: None,
    wanted: str = "",
) -> Rows:
    """Read the rows of one or several sources: files, directories and patterns that stand for
    files, or hub datasets (their train split). SOURCE:0.3 gives a source a weight.

    Args:
        sources: The sources, in the order of their rows.
        columns: The names that keys have in the sources, by those that lorafold knows, as in
            {"prompt": "question"}.
        notice: Is told how large data is kept, how many of its rows are read, and which files a
            directory has.
        wanted: What is asked of the rows, of what shapes give: chooses the shape of rows that have
            the keys of several.

    Raises LorafoldError if a source can't be read, has no row, or has bad rows (all are counted,
    the first ten listed).
    """
    named = [source_from(text) for text in ([sources] if isinstance(sources, str) else sources)]
    columns = columns or {}
    size = sum(source.size for source in named)
    if size <= LARGE:
        reading = Reading(named, columns, wanted, notice)
        rows: Sequence[Row] = list(reading)
        about, known = reading.about, None
    else:

        def write(directory: Path) -> None:
            notice(f"reading {size / 1e9:.2f} GB of rows; they are kept in {directory.parent}")
            reading = Reading(named, columns, wanted, notice)
            digest = write_rows(reading, directory / "rows.arrow")
            known = {"sha256": digest.sha256, "bytes": digest.bytes}
            write_json(directory / "about.json", reading.about | known)

        from lorafold.identity import of_code  # which loads torch

        code = of_code("data", packages=("datasets", "pyarrow"))
        identities = [[source.several, source.identity] for source in named]
        key = json.dumps([code, identities, sorted(columns.items()), wanted])
        path = cached("rows", key, write, notice)
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
        rows, known = ArrowRows(path / "rows.arrow"), (about["sha256"], about["bytes"])
    parts = tuple(Part(count, named[n].weight) for n, count in about["parts"])
    ignored, told = tuple(about["ignored"]), tuple(about["told"])
    for guessed in about["guessed"]:
        log.warning(guessed)
    counts = [count for _, count in about["files"]]
    files = dict[str, int]()
    for source in named:
        of = dict(zip((file.name for file in source.files), counts, strict=False))
        del counts[: len(of)]
        if source.several:
            notice(f"{source.name}: {source.told(of)}")
            files |= of
    names = [file.name for source in named for file in source.files]
    origins = Origins(tuple((names[n], first, count) for n, first, count in about["runs"]))
    return Rows(rows, parts, ignored, known, wanted, told, files, origins)


def as_checked(rows: Sequence[Row], wanted: str = "") -> Rows:
    """Rows of which some may not have been checked yet; their source is named "data"."""
    return rows if isinstance(rows, Rows) else check_rows(enumerate(rows, 1), "data", wanted)


def check_rows(numbered: Iterable[tuple[int, Any]], source: str, wanted: str = "") -> Rows:
    """Return rows, once they are known to be well-formed and of one shape. Raises as `checked`.

    Args:
        numbered: (number, row) pairs, as `checked` takes them.
        source: The name of the data in messages.
        wanted: What is asked of the rows, as for `read_rows`.
    """
    noticed, found, runs = Noticed(wanted), list[Row](), list[list[int]]()
    usable = ((number, as_row(row) if isinstance(row, dict) else row) for number, row in numbered)
    for place, _, row in checked(usable, source, shapes=shapes_for(wanted), noticed=noticed):
        found.append(row)
        if not runs or place != sum(runs[-1]):
            runs.append([place, 0])
        runs[-1][1] += 1
    parts, origins = (Part(len(found)),), Origins(tuple(("", first, n) for first, n in runs))
    return Rows(found, parts, noticed.ignored, None, wanted, noticed.told, origins=origins)
