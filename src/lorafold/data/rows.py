"""Reads a user's rows, and checks that those of one source are well-formed and of one shape.

    rows = read_rows(["mine.jsonl", "other.jsonl:0.3"])       an epoch takes 0.3 of the second

Further keys are ignored, and `Rows.ignored` names them. One error message lists everything that is
wrong, each with its file, row (in a JSONL file the line, from 1), field, and what was found and
expected. Large data is checked once: its rows are kept in the cache, under the digest of the files.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from lorafold.data.checking import checked, ignored_keys, renamed
from lorafold.data.shapes import Shape
from lorafold.data.sources import Row, Source, source_from
from lorafold.data.stored import LARGE, ArrowRows, Part, Rows, write_rows
from lorafold.files.atomic import write_json
from lorafold.files.cache import cached

Notice = Callable[[str], None]


def read_rows(
    sources: str | Sequence[str],
    columns: Mapping[str, str] | None = None,
    notice: Notice = lambda text: None,
) -> Rows:
    """Read the rows of one or several sources: .jsonl, .json, .csv or .parquet files, directories,
    or hub datasets (their train split). SOURCE:0.3 gives a source a weight.

    Args:
        sources: The sources, in the order of their rows.
        columns: The names that keys have in the sources, by those that lorafold knows, as in
            {"prompt": "question"}.
        notice: Is told how large data is kept, and how many of its rows are read.

    Raises LorafoldError if a source can't be read, has no row, or has bad rows (all are counted,
    the first ten listed).
    """
    named = [source_from(text) for text in ([sources] if isinstance(sources, str) else sources)]
    columns = columns or {}
    size = sum(source.size for source in named)
    if size <= LARGE:
        found = [list(_checked(source, columns)) for source in named]
        parts = tuple(Part(len(r), s.weight) for r, s in zip(found, named, strict=True))
        together = list(chain.from_iterable(found))
        return Rows([row for _, row in together], parts, ignored_keys(together))
    identities = [[Path(source.name).suffix, source.identity] for source in named]

    def write(directory: Path) -> None:
        notice(f"reading {size / 1e9:.2f} GB of rows; they are kept in {directory.parent}")
        counts = list[int]()
        seen, ignored = set[str](), dict[str, None]()

        def counted() -> Iterator[Row]:
            for source in named:
                counts.append(0)
                for shape, row in _checked(source, columns):
                    if not seen.issuperset(row):
                        ignored.update(dict.fromkeys(shape.unknown(row)))
                        seen.update(key for key, value in row.items() if value is not None)
                    counts[-1] += 1
                    if counts[-1] % 100_000 == 0:
                        notice(f"{source.name}: {counts[-1]:,} rows read")
                    yield row

        digest = write_rows(counted(), directory / "rows.arrow")
        known = {"sha256": digest.sha256, "bytes": digest.bytes}
        about = {"counts": counts, "ignored": list(ignored), **known}
        write_json(directory / "about.json", about)

    from lorafold.identity import of_code  # which loads torch

    code = of_code("data", packages=("datasets", "pyarrow"))
    key = json.dumps([code, identities, sorted(columns.items())])
    path = cached("rows", key, write, notice)
    about = json.loads((path / "about.json").read_text(encoding="utf-8"))
    parts = tuple(Part(n, s.weight) for n, s in zip(about["counts"], named, strict=True))
    known = about["sha256"], about["bytes"]
    return Rows(ArrowRows(path / "rows.arrow"), parts, tuple(about["ignored"]), known)


def _checked(source: Source, columns: Mapping[str, str]) -> Iterator[tuple[Shape, Row]]:
    return checked(renamed(source.numbered(), columns), source.name)


def as_checked(rows: Sequence[Row]) -> Rows:
    """Rows of which some may not have been checked yet; their source is named "data"."""
    return rows if isinstance(rows, Rows) else check_rows(enumerate(rows, 1), "data")


def check_rows(numbered: Iterable[tuple[int, Row | str]], source: str) -> Rows:
    """Return rows, once they are known to be well-formed and of one shape. Raises as `checked`."""
    found = list(checked(numbered, source))
    return Rows.of([row for _, row in found], ignored_keys(found))
