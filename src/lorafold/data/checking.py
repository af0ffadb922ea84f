"""The check that rows are well-formed, of one shape, and give what is asked of them."""

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
) -> Iterator[tuple[Shape, Row]]:
    """Yield the rows that are well-formed and of the first one's shape, each with the shape.

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
        if not bad and shape is not None and not isinstance(row, str):
            yield shape, row
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


def ignored_keys(rows: Iterable[tuple[Shape, Row]]) -> tuple[str, ...]:
    """The keys of checked rows that are no part of their shapes, in the order in which they appear.
    """
    return tuple(dict.fromkeys(key for shape, row in rows for key in shape.unknown(row)))
