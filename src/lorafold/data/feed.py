"""The feed of a run: the examples of each optimizer step, from any step on.

    for examples in feed.after(step): ...

A feed depends on nothing but its arguments: a resumed run goes on where the stopped one was.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lorafold.data.batches import Batches
from lorafold.data.stored import Part


class Feed(ABC):
    """Abstract: the examples of each of `steps` optimizer steps. `foreseen` is how many of them can
    be looked at in advance at little cost; `marked` rows, of those that were read, have control
    tokens that are text.
    """

    marked = 0
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
        self, examples: Sequence[Any], parts: Sequence[Part], batch: int, steps: int, seed: int
    ) -> None:
        """Plan the steps.

        Args:
            parts: How many of them are from each source.
            batch: Examples of an optimizer step.
            steps: The number of optimizer steps.
            seed: The seed of the order.
        """
        self.examples, self.steps, self.batch = examples, steps, batch
        self.marked = getattr(examples, "marked", 0)
        self._batches = Batches(parts, batch, steps, seed)
        self.passes = steps * batch / max(1, len(examples))

    def with_examples(self, change: Callable[[Any], Sequence[Any]]) -> "StoredFeed":
        """A feed of the same steps, whose examples are what `change` makes of these, in order."""
        changed = copy.copy(self)
        changed.examples = change(self.examples)
        return changed

    def after(self, step: int) -> Iterator[Sequence[Any]]:
        for i in range(step, len(self._batches)):
            yield [self.examples[j] for j in self._batches[i]]

    def drawn(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        for indices in Batches(len(self.examples), size, n, seed):
            yield [self.examples[i] for i in indices]
