"""Messages, progress bars, and tables and paragraphs of plain text for 80 columns. Nothing is cut:
a heading or a name that is too long continues in the next line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80
NOTHING = "–"  # in place of a figure
Progress = Callable[[int, int], None]  # called as progress(done, total)
ENOUGH, LEAST = 20, 8  # characters of the first column before figures break, and after


def print_lines(console: Console | None, *lines: object) -> None:
    """Print what is not empty as it is: without markup, colours and breaks."""
    if console is not None:
        for line in filter(None, lines):
            console.print(str(line), highlight=False, markup=False, soft_wrap=True)


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """A table with names in its first column and figures in the others. Headings wrap; names, and
    figures of several words, do so if the table would be wider than `width`.
    """
    from rich.console import Console
    from rich.table import Table

    columns = [*zip(head, *lines, strict=True)]
    words = [max(map(len, " ".join(cells).split())) for cells in columns]
    sizes = [max(word, *map(len, cells[1:]), 0) for word, cells in zip(words, columns, strict=True)]
    room = width - 2 * (len(sizes) - 1)
    sizes[0] = min(sizes[0], max(ENOUGH, room - sum(sizes[1:])))
    while sum(sizes) > room and sizes[1:] != words[1:]:
        widest = max(range(1, len(sizes)), key=lambda n: sizes[n] - words[n])
        sizes[widest] = words[widest]
    sizes[0] = min(sizes[0], max(LEAST, room - sum(sizes[1:])))
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
    """A number of bytes, such as 39.1 MB."""
    size, unit = next(((10**k, u) for k, u in ((9, "GB"), (6, "MB")) if n >= 10**k), (1e3, "kB"))
    return f"{n / size:.1f} {unit}"


def paragraph(text: str, opening: str = "", width: int = WIDTH) -> list[str]:
    """The text in lines of at most so many characters, the first one after `opening`; a long word,
    for example a path, stays whole.
    """
    return wrap(
        text,
        width,
        initial_indent=opening,
        subsequent_indent=" " * len(opening),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [opening.rstrip()]


def shown(value: float | None, form: str) -> str:
    """The formatted value, or a dash for None."""
    return NOTHING if value is None else f"{value:{form}}"


def values_of(items: Iterable[Any], path: str) -> list[Any]:
    """The value of each item at a dotted path of attributes; None where a part of it is None."""

    def inner(value: Any, name: str) -> Any:
        return None if value is None else getattr(value, name)

    return [reduce(inner, path.split("."), item) for item in items]


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known, or None."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def spread(values: Iterable[float | None], form: str, ranged: bool | None = None) -> str:
    """The mean of the known values as text, a dash for none. The lowest and the highest follow if
    `ranged`, or by default if they differ.
    """
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    lowest, mean, highest = (f"{value:{form}}" for value in (min(known), fmean(known), max(known)))
    ranged = lowest != highest if ranged is None else ranged
    return f"{mean} ({lowest} to {highest})" if ranged else mean


def silent(done: int, total: int) -> None:
    """A progress that shows nothing."""


@contextmanager
def progress_bars(console: Console | None) -> Iterator[Callable[[str], Progress]]:
    """A function that makes a progress bar by its name; they are shown on terminals alone."""
    from rich import progress

    quiet = console is None or not console.is_terminal
    with progress.Progress(console=console, transient=True, disable=quiet) as bars:

        def bar(name: str) -> Progress:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar


@contextmanager
def progress_bar(console: Console | None, name: str) -> Iterator[Progress]:
    """A progress bar."""
    with progress_bars(console) as bar:
        yield bar(name)
