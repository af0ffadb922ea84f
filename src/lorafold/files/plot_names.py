"""Names in plots, cut to the room that there is: a Chinese character takes the place of two."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from textwrap import fill
from unicodedata import east_asian_width

WIDE, ROOM = 24, 16  # characters of a name in one line, and of a line of several
SECOND = "\u200b"  # invisible: stands after a character that is as wide as two, to be counted


def spaced(name: str) -> str:
    """A name as wide as it has characters: with a second one behind each that is as wide as two."""
    wide = (c + SECOND * (east_asian_width(c) in "WF") for c in name.replace(SECOND, ""))
    return "".join(wide)


def short(name: str, most: int) -> str:
    """A name of at most this width in characters: of a longer one its beginning and its end."""
    name, half = spaced(name), (most - 1) // 2
    if len(name) <= most:
        return name
    start, end = name[: most - 1 - half], name[len(name) - half :]
    whole = start[:-1] if name[len(start)] == SECOND else start
    return f"{whole}…{end.removeprefix(SECOND)}"


def distinct(names: Sequence[str], most: int) -> list[str]:
    """Names of at most this width in characters, or of the width that tells them apart."""
    shown = [short(name, most) for name in names]
    told_apart = len({*shown}) == len({*map(spaced, names)})
    return shown if told_apart else distinct(names, most + 2)


def folded(name: str, most: int) -> str:
    """A name on at most this many lines, shortened where it takes more."""
    name = spaced(name)
    sizes = range(len(name), 0, -1)
    lines = (fill(short(name, size), ROOM) for size in sizes)
    return next((text for text in lines if text.count("\n") < most), name)


def common(names: Sequence[str]) -> int:
    """How many characters at the beginning are the same in all names, up to the end of a word."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return len(re.sub(r"[^\W_]+$", "", "".join(letters[0] for letters in same)))


def brief(names: Sequence[str]) -> list[str]:
    """Names without the words at which all begin and end, where some are too long for a line."""
    if len(names) < 2 or all(len(spaced(name)) <= WIDE for name in names):
        return [*names]
    start, end = map(common, (names, [name[::-1] for name in names]))
    parts = [name[start : len(name) - end] for name in names]
    return [f"{'…' * (start > 0)}{p}{'…' * (end > 0)}" for p in parts] if all(parts) else [*names]
