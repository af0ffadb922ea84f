"""What a verb is given: rows, paths of adapters, a console.

Nothing here imports torch, so that what is wrong with rows is told at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.data.rows import Row, check_rows, read_rows, renamed

if TYPE_CHECKING:
    from rich.console import Console

Paths = str | Path | Sequence[str | Path]  # one directory or several
Rows = str | Path | Sequence[Row]
Columns = Mapping[str, str]  # the user's names of keys, by lorafold's
Tasks = Mapping[str, Rows] | Sequence[str | Path]  # rows by the name of a task, or files


def as_rows(data: Rows, columns: Columns | None = None) -> list[Row]:
    """The rows as a list, after they are read, if a source is named, and checked. `columns` renames
    their keys: {"prompt": "question"}.

    Raises LorafoldError for bad rows and for a source that can't be read.
    """
    if isinstance(data, (str, Path)):
        return read_rows(str(data), columns)
    return check_rows(renamed(enumerate(data, 1), columns or {}), source_of(data))


def source_of(data: Rows) -> str:
    """The source of the rows, for records and messages."""
    return str(data) if isinstance(data, (str, Path)) else "rows given in Python"


def as_paths(adapters: Paths) -> list[Path]:
    """The paths as a list, also if there is only one."""
    one = isinstance(adapters, (str, Path))
    return [Path(adapters)] if one else [Path(path) for path in adapters]  # type: ignore[arg-type, union-attr]


def or_quiet(console: Console | None) -> Console:
    """The console, or for None one that prints nothing."""
    from rich.console import Console

    return console or Console(quiet=True)
