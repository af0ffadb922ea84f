"""The check that rows are well-formed and of one shape, and that an objective can use them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lorafold.data.shapes import SHAPES, Shape, shape_of
from lorafold.data.sources import Row
from lorafold.errors import LorafoldError

LISTED = 10  # bad rows that one message lists


def renamed(
    numbered: Iterable[tuple[int, Row | str]], columns: Mapping[str, str]
) -> Iterator[tuple[int, Row | str]]:
    """Numbered rows whose keys have other names: the value under `columns[name]` is then under
    `name`. A row that lacks one of these keys, or has a value under `name` too, which would be
    lost, becomes the reason why it can't be read.
    """
    if not columns:
        yield from numbered
        return
    theirs = set(columns.values())
    for number, row in numbered:
        if isinstance(row, str):
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


def checked(
    numbered: Iterable[tuple[int, Row | str]],
    source: str,
    at_once: bool = False,
    shapes: Sequence[Shape] = SHAPES,
) -> Iterator[Row]:
    """Yield the rows that are well-formed and of the first one's shape.

    After the last row, raises LorafoldError that lists the first ten bad rows, or says that there
    is no row.

    Args:
        numbered: (number, row) pairs. A str in place of a row is the reason why that row could not
            be read.
        source: The name of the data in messages, such as the path of a file.
        at_once: Raise the error for the first bad row, without reading on.
        shapes: The shapes that a row may have.
    """
    bad: dict[str, list[int]] = {}  # the rows by what is wrong with them
    first: tuple[int, Shape] | None = None
    for number, row in numbered:
        shape = None if isinstance(row, str) else shape_of(row, shapes)
        if isinstance(row, str):
            problems = [row]
        elif shape is None:
            keys = ", ".join(repr(key) for key in row) or "none"
            known = ", ".join(map(str, shapes))
            problems = [f"keys found: {keys}; expected one of {known} (--columns renames)"]
        else:
            first = first or (number, shape)
            problems = list(shape.problems(row))
            if shape is not first[1]:
                problems.append(f"shape {shape}, but row {first[0]} has {first[1]}")
        for problem in problems:
            bad.setdefault(problem, []).append(number)
        if bad and at_once:
            break
        if not bad and not isinstance(row, str):
            yield row
    if bad:
        told = [f"{_numbers(numbers)}: {problem}" for problem, numbers in bad.items()]
        more = f"; and {len(told) - LISTED} more" if len(told) > LISTED else ""
        raise LorafoldError(f"{source}: {'; '.join(told[:LISTED])}{more}")
    if first is None:
        raise LorafoldError(f"{source}: no rows found, expected at least one")


def _numbers(numbers: Sequence[int]) -> str:
    """The rows that one problem is told of, as a person would name them."""
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return f"row {first}"
    if last - first == len(numbers) - 1:
        return f"rows {first} to {last}"
    return f"{len(numbers)} rows from {first} to {last}"


def ignored_keys(rows: Sequence[Row]) -> tuple[str, ...]:
    """The keys of the rows that are no part of their shapes, in the order in which they appear."""
    found: dict[str, None] = {}
    for row in rows:
        shape = shape_of(row)
        known = () if shape is None else (*shape.keys, *shape.optional)
        found.update((k, None) for k, v in row.items() if v is not None and k not in known)
    return tuple(found)


def is_labelled(rows: Sequence[Row]) -> bool:
    """Tell whether the rows are labelled texts, for a classifier."""
    return (shape := shape_of(rows[0])) is not None and shape.objectives == ("classify",)


def check_objective(firsts: Iterable[Row], objective: str) -> None:
    """Raise LorafoldError if the objective does not train on rows of the shapes that the first rows
    of all sources have.
    """
    for shape in map(shape_of, firsts):
        if shape is None or objective not in shape.objectives:
            takes = " or ".join(str(s) for s in SHAPES if objective in s.objectives)
            other = f", which are for --objective {' or '.join(shape.objectives)}" if shape else ""
            raise LorafoldError(
                f"data: found rows of {shape}{other}; --objective {objective} expects rows of"
                f" {takes}"
            )
