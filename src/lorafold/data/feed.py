"""The feed of a run: the examples of each optimizer step, from any step on.

    for examples in feed.after(step): ...

A feed depends on nothing but its arguments: a resumed run goes on where the stopped one was.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lorafold.data.arrow import Array
from lorafold.data.batches import Batches
from lorafold.data.stored import Part


class Feed(ABC):
    """Abstract: the examples of each of `steps` optimizer steps. `foreseen` is how many of them can
    be looked at in advance at little cost.
    """

    foreseen: int
    steps: int

    @abstractmethod
    def after(self, step: int) -> Iterator[Sequence[Any]]:
        """The examples of the steps after the first `step`, which are at most `batch` rows each."""

    @abstractmethod
    def drawn(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        """Examples that no step depends on.

        Args:
            n: How many batches.
            size: Rows of a batch.
            seed: The seed of their order.
        """

    def __str__(self) -> str:
        """What is worth telling after the last step; empty for nothing."""
        return ""


class StoredFeed(Feed):
    """Examples that are all at hand; `passes` is how often each comes in a run."""

    foreseen = 1000

    def __init__(
        self,
        examples: Sequence[Any],
        parts: Sequence[Part],
        batch: int,
        steps: int,
        seed: int,
        firsts: Array | None = None,
    ) -> None:
        """Plan the steps.

        Args:
            parts: How many rows are from each source.
            batch: Rows of an optimizer step.
            steps: The number of optimizer steps.
            seed: The seed of the order.
            firsts: The first example of each row, ascending; None: each row has one.
        """
        self.examples, self.steps, self.batch = examples, steps, batch
        n = len(examples)
        self._borders = np.arange(n + 1) if firsts is None else np.append(firsts, n)
        self._batches = Batches(parts, batch, steps, seed)
        self.passes = steps * batch / max(1, len(self._borders) - 1)

    def with_examples(self, change: Callable[[Any], Sequence[Any]]) -> "StoredFeed":
        """A feed of the same steps, whose examples are what `change` makes of these, in order."""
        changed = copy.copy(self)
        changed.examples = change(self.examples)
        return changed

    def after(self, step: int) -> Iterator[Sequence[Any]]:
        for i in range(step, len(self._batches)):
            yield self._of(self._batches[i])

    def drawn(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        yield from map(self._of, Batches(len(self._borders) - 1, size, n, seed))

    def _of(self, rows: Sequence[int]) -> list[Any]:
        """The examples of rows."""
        ends = ((int(self._borders[n]), int(self._borders[n + 1])) for n in rows)
        return [self.examples[i] for start, end in ends for i in range(start, end)]


def by_row(examples: Sequence[Any], parts: Sequence[Part]) -> tuple[Array, tuple[Part, ...]] | None:
    """The first example of each row, and how many rows are from each source; None if each row has
    one example.

    Args:
        parts: How many examples are from each source.
    """
    rows = getattr(examples, "rows", None)
    if rows is None or len(firsts := np.flatnonzero(np.diff(rows, prepend=-1))) == len(rows):
        return None
    sizes = np.diff(np.searchsorted(firsts, np.cumsum([0, *(part.size for part in parts)])))
    return firsts, tuple(Part(int(n), p.weight) for n, p in zip(sizes, parts, strict=True))
