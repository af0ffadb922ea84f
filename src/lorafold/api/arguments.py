"""What a verb is given: rows, paths of adapters, a console.

Nothing here imports torch, so that what is wrong with rows is told at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafold.data.rows import check_rows, ignored_keys, read_rows, renamed
from lorafold.data.shapes import Row, shape_of

if TYPE_CHECKING:
    from rich.console import Console

Paths = str | Path | Sequence[str | Path]  # one directory or several
Rows = str | Path | Sequence[Row]
Columns = Mapping[str, str]  # the user's names of keys, by lorafold's
Tasks = Mapping[str, Rows] | Sequence[str | Path]  # rows by the name of a task, or files


def as_rows(
    data: Rows, columns: Columns | None = None, console: Console | None = None
) -> list[Row]:
    """The rows as a list, after they are read, if a source is named, and checked.

    Args:
        data: A file, a directory or a hub dataset, or the rows themselves.
        columns: The user's names of keys, by lorafold's, as in {"prompt": "question"}.
        console: Where the keys are named that the rows have and lorafold ignores.

    Raises LorafoldError for bad rows and for a source that can't be read.
    """
    source = source_of(data)
    if isinstance(data, (str, Path)):
        rows = read_rows(source, columns)
    else:
        rows = check_rows(renamed(enumerate(data, 1), columns or {}), source)
    if console is not None and (names := ignored_keys(rows)):
        text = f"{source}: ignored keys: {', '.join(names)} (rows of {shape_of(rows[0])})"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return rows


def source_of(data: Rows) -> str:
    """The source of the rows, for records and messages."""
    return str(data) if isinstance(data, (str, Path)) else "rows given in Python"


def as_paths(adapters: Paths) -> list[Path]:
    """The paths as a list, also if there is only one."""
    return [Path(path) for path in ([adapters] if isinstance(adapters, (str, Path)) else adapters)]


def or_quiet(console: Console | None) -> Console:
    """The console, or for None one that prints nothing."""
    from rich.console import Console

    return console or Console(quiet=True)
