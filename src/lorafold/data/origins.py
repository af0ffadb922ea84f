"""Where rows are from, so that one is named as its user finds it: by its file and its number.

    origins.places([0, 17])      [Place("a.jsonl", 1), Place("b.jsonl", 5)]

What is kept are the runs of rows that follow one another in a file: one for most files, and one
more after each blank line.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Place(NamedTuple):
    """A row: the name of its file, empty for rows given in Python, and its number there, from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}" if self.file else f"row {self.row}"


def named(places: Iterable[Place]) -> Iterator[str]:
    """How places are called one after another: the file of the one before is not named again."""
    before = None
    for place in places:
        yield f"row {place.row}" if place.file == before else str(place)
        before = place.file


@dataclass(frozen=True)
class Origins:
    """Where each row is from. `runs` are the name of a file, the number of a row in it, and how
    many rows follow one another from there on; rows without any are numbered as they come. `chosen`
    are the indices of the rows that were selected of all, (n,).
    """

    runs: tuple[tuple[str, int, int], ...] = ()
    chosen: Array | None = field(default=None, compare=False)

    def select(self, indices: Array) -> "Origins":
        """Those of the rows with these indices."""
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def places(self, rows: Iterable[int]) -> list[Place]:
        """The places of the rows with these indices."""
        at = self._at(np.fromiter(rows, np.int64))
        if not self.runs:
            return [Place("", n + 1) for n in at.tolist()]
        run, after = self._run(at)
        starts = [self.runs[n] for n in run.tolist()]
        return [Place(s[0], s[1] + n) for s, n in zip(starts, after.tolist(), strict=True)]

    def files(self, n: int) -> tuple[list[str], Array]:
        """The names of the files, and the number of that which each of n rows is from, (n,)."""
        if not self.runs:
            return [""], np.zeros(n, np.int64)
        numbers = dict[str, int]()
        of_run = [numbers.setdefault(name, len(numbers)) for name, *_ in self.runs]
        run, _ = self._run(self._at(np.arange(n)))
        return [*numbers], np.array(of_run)[run]

    def _at(self, rows: Array) -> Array:
        return rows if self.chosen is None else self.chosen[rows]

    def _run(self, at: Array) -> tuple[Array, Array]:
        """The number of the run of each of some rows, and how far it is after its beginning."""
        starts = np.cumsum([0, *(count for *_, count in self.runs)])
        run = np.searchsorted(starts, at, "right") - 1
        return run, at - starts[run]
