"""Messages, progress bars, and tables and paragraphs for 80 columns, which are wrapped and never
truncated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80
MISSING = "–"  # a missing figure
Progress = Callable[[int, int], None]  # called as progress(done, total)
FIRST_COLUMN, MIN_FIRST_COLUMN = 20, 8  # minimum widths before and after wrapping other columns


class Details(NamedTuple):
    """The details of a run, which its record contains and only `--verbose` prints."""

    lines: list[str]
    verbose: bool


DETAILS: ContextVar[Details | None] = ContextVar("details", default=None)  # of the current run


@contextmanager
def keeping_details(verbose: bool = False) -> Iterator[None]:
    before = DETAILS.set(Details([], verbose))
    try:
        yield
    finally:
        DETAILS.reset(before)


def print_lines(console: Console | None, *lines: object, detail: bool = False) -> None:
    """Prints the non-empty lines without markup, colours or wrapping. In a run that is not verbose,
    the lines become one, or none if they are a `detail`.
    """
    texts = [str(line) for line in lines if line]
    if details := DETAILS.get():
        details.lines.extend(texts * detail)
        if not details.verbose:
            texts = ["; ".join(texts)] * bool(texts and not detail)
    if console is not None:
        for text in texts:
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Formats a table whose first column contains names. Headings always wrap; names, and cells of
    several words, wrap only if the table is wider than `width`.
    """
    from rich.console import Console
    from rich.table import Table

    columns = [*zip(head, *lines, strict=True)]
    words = [max(map(len, " ".join(cells).split())) for cells in columns]
    sizes = [max(word, *map(len, cells[1:]), 0) for word, cells in zip(words, columns, strict=True)]
    room = width - 2 * (len(sizes) - 1)
    sizes[0] = min(sizes[0], max(FIRST_COLUMN, room - sum(sizes[1:])))
    while sum(sizes) > room and sizes[1:] != words[1:]:
        widest = max(range(1, len(sizes)), key=lambda n: sizes[n] - words[n])
        sizes[widest] = words[widest]
    sizes[0] = min(sizes[0], max(MIN_FIRST_COLUMN, room - sum(sizes[1:])))
    table = Table.grid(padding=(0, 2, 0, 0))
    for n, size in enumerate(sizes):
        table.add_column(width=size, justify="right" if n else "left", overflow="fold")
    for line in (head, ["-" * size for size in sizes], *lines):
        table.add_row(*line)
    console = Console(width=sum(sizes) + 2 * len(sizes), markup=False, emoji=False, highlight=False)
    with console.capture() as text:
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in text.get().splitlines())


def format_bytes(n: float) -> str:
    size, unit = next(((10**k, u) for k, u in ((9, "GB"), (6, "MB")) if n >= 10**k), (1e3, "kB"))
    return f"{n / size:.1f} {unit}"


def paragraph(text: str, opening: str = "", width: int = WIDTH) -> list[str]:
    """Wraps a text after `opening`, without breaking long words such as paths."""
    return wrap(
        text,
        width,
        initial_indent=opening,
        subsequent_indent=" " * len(opening),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [opening.rstrip()]


def formatted(value: float | None, form: str) -> str:
    return MISSING if value is None else f"{value:{form}}"


def values_of(items: Iterable[Any], path: str) -> list[Any]:
    """Returns each item's value at a dotted path, or None if an attribute is None."""

    def inner(value: Any, name: str) -> Any:
        return None if value is None else getattr(value, name)

    return [reduce(inner, path.split("."), item) for item in items]


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def mean_range(values: Iterable[float | None], form: str, ranged: bool | None = None) -> str:
    """Formats the mean of the known values, with their range if `ranged` or, by default, if they
    differ.
    """
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    lowest, mean, highest = (f"{value:{form}}" for value in (min(known), fmean(known), max(known)))
    ranged = lowest != highest if ranged is None else ranged
    return f"{mean} ({lowest} to {highest})" if ranged else mean


def no_progress(done: int, total: int) -> None:
    """Ignores the progress."""


@contextmanager
def progress_bars(console: Console | None) -> Iterator[Callable[[str], Progress]]:
    """Yields a function that creates named progress bars, visible only in terminals."""
    from rich import progress

    quiet = console is None or not console.is_terminal
    with progress.Progress(console=console, transient=True, disable=quiet) as bars:

        def bar(name: str) -> Progress:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar


@contextmanager
def progress_bar(console: Console | None, name: str) -> Iterator[Progress]:
    with progress_bars(console) as bar:
        yield bar(name)
