"""Tables and sentences as plain text that fits a terminal of 80 columns.

They are the same whether a terminal reads them or a file, and nothing of a name or a figure is cut:
a heading or a name that is too long goes on in the next line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80
GAP = "  "
NOTHING = "–"  # in place of a figure
ENOUGH, LEAST = 20, 8  # characters of the first column before figures break, and after


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """A table of texts. The first column has names, whose texts go on in further lines where the
    others leave too little room; the others have figures, each of which stands whole. Headings, and
    cells where there is no room, break between words.

    Args:
        head: The headings of the columns.
        lines: The cells of each line.
        width: The most characters of a line.
    """
    columns = [*zip(*lines, strict=True)] or [()] * len(head)
    words = [
        max(map(len, " ".join((name, *of)).split())) for name, of in zip(head, columns, strict=True)
    ]
    sizes = [max(size, *map(len, of), 0) for size, of in zip(words, columns, strict=True)]
    room = width - len(GAP) * (len(sizes) - 1)
    sizes[0] = min(sizes[0], max(ENOUGH, room - sum(sizes[1:])))
    while sum(sizes) > room and sizes[1:] != words[1:]:
        widest = max(range(1, len(sizes)), key=lambda n: sizes[n] - words[n])
        sizes[widest] = words[widest]
    sizes[0] = min(sizes[0], max(LEAST, room - sum(sizes[1:])))
    rule = ["-" * size for size in sizes]
    return "".join(f"{text}\n" for line in (head, rule, *lines) for text in _folded(line, sizes))


def print_lines(console: Console, *lines: object) -> None:
    """Print what is not empty as it is: without markup, colours and breaks."""
    for line in filter(None, lines):
        console.print(str(line), highlight=False, markup=False, soft_wrap=True)


def format_bytes(n: float) -> str:
    """A number of bytes, such as 39.1 MB."""
    size, unit = next(((10**k, u) for k, u in ((9, "GB"), (6, "MB")) if n >= 10**k), (1e3, "kB"))
    return f"{n / size:.1f} {unit}"


def _folded(cells: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """The lines of text of one line of the table."""
    folded = [
        wrap(cell, size, break_on_hyphens=False) or [""]
        for cell, size in zip(cells, sizes, strict=True)
    ]
    most = max(map(len, folded))
    padded = [[*of, *[""] * (most - len(of))] for of in folded]
    return [
        GAP.join(
            text.rjust(size) if n else text.ljust(size)
            for n, (text, size) in enumerate(zip(texts, sizes, strict=True))
        ).rstrip()
        for texts in zip(*padded, strict=True)
    ]


def paragraph(text: str, opening: str = "", width: int = WIDTH) -> list[str]:
    """The text in lines of at most so many characters, the first one after `opening`; a long word,
    as a path is, stays whole.
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


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known, or None."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def spread(values: Iterable[float | None], form: str, ranged: bool | None = None) -> str:
    """The mean of figures as text, a dash for none.

    Args:
        values: The figures.
        form: Their format.
        ranged: Whether the lowest and the highest follow; None for where they differ.
    """
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    lowest, mean, highest = (f"{value:{form}}" for value in (min(known), fmean(known), max(known)))
    ranged = lowest != highest if ranged is None else ranged
    return f"{mean} ({lowest} to {highest})" if ranged else mean
