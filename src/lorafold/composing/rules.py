"""The ways of composing that are arithmetic, in one table with their defaults.

    way               entries kept         joined by        weights    rank
    linear            all                  sum              1/n        sum of the adapters', exact
    task-arithmetic   all                  sum              1          sum of the adapters', exact
    svd               all                  sum              1/n        the largest of the adapters'
    ties              largest fifth        disjoint mean    1          sum of the adapters'
    dare              random half          sum              1/n        sum of the adapters'
    dare-ties         random half          disjoint mean    1          sum of the adapters'
    magnitude         largest fifth        sum              1/n        sum of the adapters'

n is the number of adapters; a negative weight of task arithmetic removes a task. `arithmetic` has
the equations and papers. A fifth is the default of TIES' paper; the other papers choose the share
for each task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lorafold.composing.arithmetic import Joined, Kept, disjoint_mean, drop, summed, times, trim
from lorafold.composing.updates import Change, Site, dense
from lorafold.core.delta import Additive
from lorafold.core.rounding import generator_of
from lorafold.errors import LorafoldError


def average(n: int) -> float:
    """The weight of each of n updates in their mean."""
    return 1 / n


def whole(n: int) -> float:
    """The weight of each of n updates in their sum."""
    return 1.0


@dataclass(frozen=True)
class Rule:
    """One way of composing, with its defaults: `weight(n)` for each of n adapters, `rank(ranks)` of
    a site from those of its updates, and the `density` of the entries that are kept.
    """

    joined: Joined
    weight: Callable[[int], float]
    rank: Callable[[Sequence[int]], int] = sum
    kept: Kept | None = None
    density: float | None = None

    def share(self, asked: float | None) -> float | None:
        """The share of entries to keep: that asked for, or the default; None where all stay."""
        return None if self.kept is None else asked or self.density

    @torch.no_grad()
    def at(
        self, site: Site, weights: Sequence[float], density: float | None, seed: int
    ) -> Iterator[Change]:
        """Yield the composition of each matrix of a site.

        Args:
            site: The site, with its updates.
            weights: One for each adapter.
            density: As `share` gives it.
            seed: The entries that stay follow from it, the site and the number of the adapter.
        """
        draws = {i: generator_of(seed, f"{site.path}/{i}") for i, _ in site.there}
        for _, changes in site.changes():
            kept = changes
            if self.kept is not None and density is not None:
                kept = {i: self.kept(dense(c), density, draws[i]) for i, c in changes.items()}
            yield self.joined([times(change, weights[i]) for i, change in kept.items()])

    def rank_at(self, site: Site, asked: int | None) -> int:
        """The rank of a site: that asked for, or the default.

        Raises LorafoldError as `rank_of`.
        """
        return asked or self.rank([rank_of(update, site.path) for _, update in site.there])


def rank_of(update: Additive, path: str) -> int:
    """The rank of an update. Raises LorafoldError for one that is not a product of factors."""
    if (factors := update.factors()) is None:
        raise LorafoldError(
            f"{path}: found {type(update).__name__}, which is not a product of two factors and has"
            " no rank of its own; give --rank"
        )
    return factors[1].shape[-2]


RULES: dict[str, Rule] = {
    "linear": Rule(summed, average),
    "task-arithmetic": Rule(summed, whole),
    "svd": Rule(summed, average, max),
    "ties": Rule(disjoint_mean, whole, kept=trim, density=0.2),
    "dare": Rule(summed, average, kept=drop, density=0.5),
    "dare-ties": Rule(disjoint_mean, whole, kept=drop, density=0.5),
    "magnitude": Rule(summed, average, kept=trim, density=0.2),
}
