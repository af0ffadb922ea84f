"""Reads a user's rows, and checks that all are well-formed and of one shape.

Further keys are ignored, and `ignored_keys` names them. One error message lists everything that is
wrong, each with its file, row (in a JSONL file the line, from 1), field, and what was found and
expected.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lorafold.data.shapes import SHAPES, Shape, shape_of
from lorafold.data.sources import Row, numbered_rows
from lorafold.errors import LorafoldError

LISTED = 10  # bad rows that one message lists


def read_rows(source: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read the rows of a .jsonl, .json, .csv or .parquet file, a directory, or a hub dataset (its
    train split).

    `columns` gives keys of the source the names that lorafold knows: {"prompt": "question"}.

    Raises LorafoldError if the source can't be read, has no row, or has bad rows (all are counted,
    the first ten listed).
    """
    return check_rows(renamed(numbered_rows(source), columns or {}), source)


def renamed(
    numbered: Iterable[tuple[int, Row | str]], columns: Mapping[str, str]
) -> Iterator[tuple[int, Row | str]]:
    """Numbered rows whose keys have other names: the value under `columns[name]` is then under
    `name`. A row that lacks one of these keys, or has a value under `name` too, which would be
    lost, becomes the reason why it can't be read.
    """
    theirs = set(columns.values())
    for number, row in numbered:
        if isinstance(row, str) or not columns:
            yield number, row
        elif missing := [key for key in columns.values() if key not in row]:
            keys = ", ".join(map(repr, row)) or "none"
            yield number, f"found no column {', '.join(map(repr, missing))}; it has {keys}"
        elif lost := [name for name in columns if name in row and name not in theirs]:
            pairs = ", ".join(f"{name}={columns[name]}" for name in lost)
            yield number, f"--columns {pairs}: the row has a column {', '.join(lost)} as well"
        else:
            rest = {key: value for key, value in row.items() if key not in theirs}
            yield number, rest | {name: row[key] for name, key in columns.items()}


def check_rows(numbered: Iterable[tuple[int, Row | str]], source: str) -> list[Row]:
    """Return the rows, once they are known to be well-formed and of one shape.

    Raises LorafoldError that lists the first ten bad rows, or says that there is no row.

    Args:
        numbered: (number, row) pairs. A str in place of a row is the reason why that row could not
            be read.
        source: The name of the data in messages, such as the path of a file.
    """
    rows: list[Row] = []
    bad: dict[str, list[int]] = {}  # the rows by what is wrong with them
    first: tuple[int, Shape] | None = None
    for number, row in numbered:
        if isinstance(row, str):
            bad.setdefault(row, []).append(number)
            continue
        shape = shape_of(row)
        if shape is None:
            keys = ", ".join(repr(key) for key in row) or "none"
            shapes = ", ".join(map(str, SHAPES))
            problem = f"keys found: {keys}; expected one of {shapes} (--columns renames)"
            bad.setdefault(problem, []).append(number)
            continue
        first = first or (number, shape)
        problems = list(shape.problems(row))
        if shape is not first[1]:
            problems.append(f"shape {shape}, but row {first[0]} has {first[1]}")
        for problem in problems:
            bad.setdefault(problem, []).append(number)
        rows.append(row)
    if bad:
        told = [f"{_numbers(numbers)}: {problem}" for problem, numbers in bad.items()]
        more = f"; and {len(told) - LISTED} more" if len(told) > LISTED else ""
        raise LorafoldError(f"{source}: {'; '.join(told[:LISTED])}{more}")
    if not rows:
        raise LorafoldError(f"{source}: no rows found, expected at least one")
    return rows


def _numbers(numbers: Sequence[int]) -> str:
    """The rows that one problem is told of, as a person would name them."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"row {first}"
    if last - first == len(numbers) - 1:
        return f"rows {first} to {last}"
    return f"{len(numbers)} rows from {first} to {last}"


def ignored_keys(rows: Sequence[Row]) -> tuple[str, ...]:
    """The keys of the rows that are no part of their shape, in the order in which they appear."""
    known = () if (shape := shape_of(rows[0])) is None else (*shape.keys, *shape.optional)
    found = dict.fromkeys(k for row in rows for k, v in row.items() if v is not None)
    return tuple(key for key in found if key not in known)


def is_labelled(rows: Sequence[Row]) -> bool:
    """Tell whether the rows are labelled texts, for a classifier."""
    return (shape := shape_of(rows[0])) is not None and shape.objective == "classify"


def check_objective(rows: Sequence[Row], objective: str) -> None:
    """Raise LorafoldError if the objective does not train on rows of this shape."""
    shape = shape_of(rows[0])
    if shape is None or shape.objective != objective:
        takes = " or ".join(str(s) for s in SHAPES if s.objective == objective)
        other = f", which are for --objective {shape.objective}" if shape else ""
        raise LorafoldError(
            f"data: found rows of {shape}{other}; --objective {objective} expects rows of"
            f" {takes}"
        )
