"""How a function judges: what it is called with, and what it may return.

    fn(prompt, completion, **row) -> number                 called for each completion
    fn(prompts, completions, **row) -> a list of numbers    called for a batch, fields as lists too

It is called with what it names, of the row's fields too; with `**` it is called with all of them.
A bool counts as 0 or 1, and a scalar of NumPy or torch as its number. None in place of a number
says that the reward does not apply to the row.
"""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lorafold.errors import cut

J = TypeVar("J")
ONE, ALL = {"prompt", "completion"}, {"prompts", "completions"}
SHOWN = 300  # characters of a message or value
LARGEST = 1e150  # of a reward: its square is still a number, and so are means and intervals


class Item(NamedTuple):
    """A completion as a function gets it: the prompt, the text, and the other fields."""

    prompt: str | list[dict[str, Any]]
    completion: str
    row: Mapping[str, Any]


class Wrong(Exception):
    """What is wrong with a function, a row or what was returned, and `at` which item; None for no
    item, or any.
    """

    def __init__(self, told: str, at: int | None = None) -> None:
        super().__init__(told)
        self.told, self.at = told, at

    def of(self, items: Sequence[J]) -> Sequence[J]:
        """The item that it is about, or all."""
        return items if self.at is None else items[self.at : self.at + 1]


class Function:
    """A function that judges."""

    def __init__(self, function: Callable[..., Any], file: str | None = None) -> None:
        self._function, self._file = function, file
        try:
            found = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise Wrong("its parameters can't be told, expected a function in Python") from None
        self._named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._every = any(p.kind == p.VAR_KEYWORD for p in found)
        names = {p.name for p in self._named}
        self.batched = bool(names & ALL)
        if self.batched == bool(names & ONE):
            given = ", ".join(map(str, found)) or "none"
            raise Wrong(
                f"found the parameters {cut(given, SHOWN)}; expected prompt and completion, or"
                " prompts and completions, or one of them"
            )

    def rewards(self, items: Sequence[Item]) -> Iterator[list[float | None]]:
        """The rewards in order, as they are computed."""
        if self.batched:
            yield self._of_all(items)
        else:
            for at, item in enumerate(items):
                given = {**item.row, "prompt": item.prompt, "completion": item.completion}
                yield [number(self._called(at, given), at)]

    def _of_all(self, items: Sequence[Item]) -> list[float | None]:
        fields = dict.fromkeys(name for item in items for name in item.row)
        needed = {p.name for p in self._named if p.default is p.empty} - ALL
        for at, item in enumerate(items):
            if lacking := sorted(needed - item.row.keys()):
                raise _lacks(lacking, item.row, at)
        given: dict[str, Any] = {name: [item.row.get(name) for item in items] for name in fields}
        given |= {
            "prompts": [i.prompt for i in items],
            "completions": [i.completion for i in items],
        }
        found = self._called(None, given, as_list=True)
        if not isinstance(found, list):
            raise Wrong(f"it returned {_shown(found)}, expected a list of {len(items)} numbers")
        if len(found) != len(items):
            raise Wrong(
                f"it returned {len(found)} rewards, expected {len(items)}, one a completion"
            )
        return [number(value, at) for at, value in enumerate(found)]

    def _called(self, at: int | None, given: Mapping[str, Any], as_list: bool = False) -> Any:
        lacking = [p.name for p in self._named if p.default is p.empty and p.name not in given]
        if lacking:
            raise _lacks(lacking, given.keys() - ONE, at)
        first = [p for p in self._named if p.kind == p.POSITIONAL_ONLY]
        names = {p.name for p in self._named} - {p.name for p in first}
        fields = given.keys() - {p.name for p in first} if self._every else given.keys() & names
        try:
            found = self._function(
                *(given.get(p.name, p.default) for p in first),
                **{name: value for name, value in given.items() if name in fields},
            )
            plain = isinstance(found, str | bytes | Mapping) or not isinstance(found, Iterable)
            return found if plain or not as_list else list(found)
        except KeyboardInterrupt:
            raise
        except Wrong as wrong:
            raise Wrong(wrong.told, at) from None
        except BaseException as error:  # also an exit, and a panic in a library
            raise Wrong(f"it raised {raised(error, self._file)}", at) from None


def number(value: Any, at: int | None) -> float | None:
    """A reward as a finite float, of at most LARGEST either way, or None."""
    if value is None:
        return None
    item = getattr(value, "item", None)
    plain = item() if callable(item) and getattr(value, "shape", None) == () else value
    try:
        found = float(plain) if isinstance(plain, Real) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Wrong(f"it returned {_shown(value)}, expected a finite number", at)
    if abs(found) > LARGEST:
        raise Wrong(f"it returned {_shown(value)}, expected at most {LARGEST:g} either way", at)
    return found


def raised(error: BaseException, file: str | None) -> str:
    """The type, message and line of an error."""
    told = cut(f"{type(error).__name__}: {error}".removesuffix(": "), SHOWN)
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
        return (
            f"SyntaxError: {error.msg} (line {error.lineno} of {Path(error.filename or '').name})"
        )
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if f.filename == file] or frames
    if not own:
        return told
    line = f": {cut(own[-1].line, SHOWN)}" if own[-1].line else ""
    return f"{told} (line {own[-1].lineno} of {Path(own[-1].filename).name}{line})"


def _lacks(names: Sequence[str], fields: Iterable[str], at: int | None) -> Wrong:
    found = ", ".join(sorted(fields)) or "none"
    return Wrong(f"it asks for {', '.join(names)}; found the fields {cut(found, SHOWN)}", at)


def _shown(value: Any) -> str:
    try:
        text = cut(repr(value), 80)
    except Exception:  # as of an integer with too many digits
        return f"a value of type {type(value).__name__}"
    return f"{text} ({type(value).__name__})"
