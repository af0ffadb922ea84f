"""The compositions that are arithmetic, one table: what is kept of each update, how they become
one, and what holds where nobody says.

    word              keeps                joins            weights    rank
    linear            all                  sum              1/n        all, exactly
    task-arithmetic   all                  sum              1          all, exactly; a negative
                                                            weight takes a task away
    svd               all                  sum              1/n        the largest of the adapters'
    ties              a fifth, trimmed     disjoint mean    1          the sum of the adapters'
    dare              half, dropped        sum              1/n        the sum of the adapters'
    dare-ties         half, dropped        disjoint mean    1          the sum of the adapters'
    magnitude         a fifth, trimmed     sum              1/n        the sum of the adapters'

n is the number of adapters. TIES keeps a fifth in its paper's default; the others' papers leave the
share to the task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorafold.composing.arithmetic import Joined, Kept, disjoint_mean, drop, summed, times, trim
from lorafold.composing.updates import Change, Site, change_of, dense
from lorafold.core.delta import Additive
from lorafold.core.rounding import generator_of
from lorafold.errors import LorafoldError


def average(n: int) -> float:
    return 1 / n


def whole(n: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Rule:
    """`weight` is each adapter's where none is given, by their number; `rank` a site's, by the
    ranks of those that change it.
    """

    joined: Joined
    weight: Callable[[int], float]
    rank: Callable[[Sequence[int]], int] = sum
    kept: Kept | None = None
    density: float | None = None

    def share(self, asked: float | None) -> float | None:
        """Of the entries that are kept; None where all are."""
        return None if self.kept is None else asked or self.density

    @torch.no_grad()
    def at(self, site: Site, weights: Sequence[float], density: float | None, seed: int) -> Change:
        """The composition at one site.

        Randomness depends on the site and the adapter's number, not on what came before.
        """
        changes = []
        for i, update in site.there:
            change = change_of(update)
            if self.kept is not None and density is not None:
                change = self.kept(dense(change), density, generator_of(seed, f"{site.path}/{i}"))
            changes.append(times(change, weights[i]))
        return self.joined(changes)

    def rank_at(self, site: Site, asked: int | None) -> int:
        return asked or self.rank([rank_of(update, site.path) for _, update in site.there])


def rank_of(update: Additive, path: str) -> int:
    """LorafoldError for an update that is no product of factors, so that it has no rank to go
    by.
    """
    if (factors := update.factors()) is None:
        raise LorafoldError(
            f"{path}: {type(update).__name__} is no product of two factors, so there is no rank to"
            " go by; give --rank"
        )
    return len(factors[1])


RULES: dict[str, Rule] = {
    "linear": Rule(summed, average),
    "task-arithmetic": Rule(summed, whole),
    "svd": Rule(summed, average, max),
    "ties": Rule(disjoint_mean, whole, kept=trim, density=0.2),
    "dare": Rule(summed, average, kept=drop, density=0.5),
    "dare-ties": Rule(disjoint_mean, whole, kept=drop, density=0.5),
    "magnitude": Rule(summed, average, kept=trim, density=0.2),
}
