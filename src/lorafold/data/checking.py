"""The check that rows are well-formed, of one shape, and give what is asked of them.

`proposed` suggests `--columns` for rows with unknown columns: known names first, else the first and
the last column of text, marked as a guess.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lorafold.data.foreign import as_known
from lorafold.data.noticed import Noticed
from lorafold.data.parsing import Row
from lorafold.data.shapes import SHAPES, Shape, shape_of
from lorafold.errors import LorafoldError, listed

ASKED = {
    *("prompt", "question", "query", "instruction", "input", "user", "q"),
    *("frage", "eingabe", "anfrage"),
}
SAID = {
    *("completion", "answer", "response", "output", "reply", "assistant", "a"),
    *("antwort", "ausgabe"),
}
WORDED = re.compile(r"[^\W\d_]")  # a text with a letter is no number or date


def proposed(row: Row) -> str:
    """The options to try for a row of no known shape; empty where there is no plain guess."""
    texts = [key for key, value in row.items() if isinstance(value, str) and WORDED.search(value)]
    asked, said = _named(texts, ASKED), _named(texts, SAID)
    if len(asked) == len(said) == 1:
        return _columns({"prompt": asked[0], "completion": said[0]})
    if len(texts) == 2:
        found = _columns({"prompt": texts[0], "completion": texts[1]})
        return f"{found} (a guess by their order, if the file begins with names)" * bool(found)
    return ""


def _named(keys: Sequence[str], names: set[str]) -> list[str]:
    return [key for key in keys if key.strip().lower() in names]


def _columns(names: dict[str, str]) -> str:
    """The option, with which `columns_of` reads these names; empty if it could not."""
    pairs = [f"{name}={column}" for name, column in names.items() if name != column]
    if any("," in pair or pair != pair.strip() for pair in pairs) or not pairs:
        return ""
    return f"did you mean --columns {shlex.quote(','.join(pairs))}"


def renamed(
    numbered: Iterable[tuple[int, Any]], columns: Mapping[str, str]
) -> Iterator[tuple[int, Any]]:
    """Numbered rows whose keys have other names: the value under `columns[name]` is then under
    `name`. A key of which there is no other name is dropped. A row that lacks one of these keys, or
    has a value under `name` too, which would be lost, becomes the reason why it can't be read.
    """
    if not columns:
        yield from numbered
        return
    names = {name: key for name, key in columns.items() if key}
    dropped = [name for name in columns if name not in names]
    theirs = {*names.values(), *dropped}
    for number, row in numbered:
        if not isinstance(row, dict):
            yield number, row
        elif missing := [key for key in (*names.values(), *dropped) if key not in row]:
            keys = listed(map(repr, row), room=100) or "none"
            there = {*columns} <= {*row} and all(names.values())
            turned = ",".join(f"{key}={name}" for name, key in names.items())
            has = f"; it has {keys}{meant(names, row)}"
            hint = f"; NAME=COLUMN is --columns {turned}" if there else has
            yield number, f"found no column {listed(map(repr, missing), room=80)}{hint}"
        elif lost := [name for name in names if name in row and name not in theirs]:
            pairs = ", ".join(f"{name}={names[name]}" for name in lost)
            yield number, f"--columns {pairs}: the row has a column {', '.join(lost)} as well"
        else:
            rest = {key: value for key, value in row.items() if key not in theirs}
            yield number, rest | {name: row[key] for name, key in names.items()}


def meant(names: Mapping[str, str], row: Mapping[str, Any]) -> str:
    """A question, after a semicolon, for the columns whose names are nearest to those that a row
    has not; empty where one of these has none.
    """
    near = {
        name: key if key in row else next(iter(get_close_matches(key, map(str, row), 1)), "")
        for name, key in names.items()
    }
    turned = ",".join(f"{name}={key}" for name, key in near.items())
    return f"; did you mean --columns {turned}?" if near and all(near.values()) else ""


def checked(
    numbered: Iterable[tuple[int, Any]],
    source: str,
    at_once: bool = False,
    shapes: Sequence[Shape] = SHAPES,
    none: bool = False,
    noticed: Noticed | None = None,
) -> Iterator[tuple[int, Shape, Row]]:
    """Yield the rows that are well-formed and of the first one's shape, with the keys by which
    shapes know them, each after its number and the shape.

    After the last row, raises LorafoldError that lists the first bad rows, or says that there
    is no row.

    Args:
        numbered: (number, row) pairs. A str in place of a row is the reason why that row could not
            be read.
        source: The name of the data in messages, such as the path of a file.
        at_once: Raise the error for the first bad row, without reading on.
        shapes: The shapes that a row may have; of several it has the first.
        none: There may be no row.
        noticed: Looks at each good row, and says which are left out; None: none is.
    """
    bad: dict[str, list[int]] = {}  # the rows by what is wrong with them
    first: tuple[int, Shape] | None = None
    used = False  # of any row
    for number, given in numbered:
        if noticed and noticed.blank(given, f"{source}: row {number}"):
            continue
        row = as_known(given)
        shape = None if isinstance(row, str) else shape_of(row, shapes)
        if isinstance(row, str):
            problems = [row]
        elif shape is None:
            problems = list(_shapeless(row, shapes))
        else:
            first = first or (number, shape)
            problems = list(shape.problems(row))
            nulls = [key for key in first[1].keys if key in row and row[key] is None]
            if shape is not first[1] and nulls:
                problems += _null(nulls, first[1])
            elif shape is not first[1]:
                problems.append(f"shape {shape}, but row {first[0]} has {first[1]}")
        for problem in problems:
            bad.setdefault(problem, []).append(number)
        if bad and at_once:
            break
        if bad or shape is None or isinstance(row, str):
            continue
        if noticed is None or noticed.add(shape, row, f"{source}: row {number}"):
            used = True
            yield number, shape, row
    if bad:
        told = [f"{_numbers(numbers)}: {problem}" for problem, numbers in bad.items()]
        raise LorafoldError(f"{source}: {listed(told, '; ')}")
    if not used and not none:
        out = "".join(f"; {text}" for text in noticed.told) if noticed else ""
        raise LorafoldError(f"{source}: no rows found, expected at least one{out}")


def _shapeless(row: Row, shapes: Sequence[Shape]) -> Iterator[str]:
    """What is wrong with a row of no shape: it has all keys of one, and some without a value, or it
    lacks keys.
    """
    near = [shape for shape in shapes if all(key in row for key in shape.keys)]
    if near:
        nearest = max(near, key=lambda shape: sum(row[key] is not None for key in shape.keys))
        yield from _null((key for key in nearest.keys if row[key] is None), nearest)
        return
    keys = listed(map(repr, row), room=80) or "none"
    guess = proposed(row)
    known = listed(shapes, room=40 if guess else 90)
    renames = f"; {guess}" if guess else " (--columns renames)"
    yield f"keys found: {keys}; expected one of {known}{renames}"


def _null(keys: Iterable[str], shape: Shape) -> Iterator[str]:
    """That these keys have no value."""
    for key in keys:
        yield f"field {key}: found null, expected a value, as rows of {shape} have one"


def _numbers(numbers: Sequence[int]) -> str:
    """The rows that one problem is told of, as a person would name them."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"row {first}"
    if last - first == len(numbers) - 1:
        return f"rows {first} to {last}"
    return f"{len(numbers)} rows from {first} to {last}"


def check_given(shapes: Iterable[Shape | None], what: str) -> None:
    """Raise LorafoldError if one of the shapes does not give what is taken of its rows.

    Args:
        shapes: One for each source; None for rows of no known shape.
        what: A key of `Shape.gives`.
    """
    for shape in shapes:
        if shape is None or what not in shape.gives:
            expected = " or ".join(str(known) for known in SHAPES if what in known.gives)
            raise LorafoldError(f"data: found rows of {shape}, expected rows of {expected}")
