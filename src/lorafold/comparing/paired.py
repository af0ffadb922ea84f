"""Which method is best on the held-out rows, and which ones these rows don't tell from it: losses
or rewards, in pairs.

    d = sum_i (s_i - s'_i) / sum_i n_i      s_i and s'_i are the summed losses of row i over its n_i
                                            tokens, of two methods or of a method and the base; or
                                            the mean rewards of prompt i, where n_i is 1; both as
                                            means over the seeds

A hard row is hard for all, so the interval of a difference, whose units are rows, is narrower than
those of the two figures. It says nothing of how far seeds differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Self

from lorafold.comparing.measure import BASE, Measurement
from lorafold.evaluation import Interval
from lorafold.evaluation.intervals import ratio_interval

Units = Sequence[tuple[float, int]]  # of each row the sum and what it is over


@dataclass(frozen=True)
class Difference:
    """A mean difference of losses or rewards and its 95% interval; None for a single row."""

    mean: float
    interval: Interval | None

    @classmethod
    def of(cls, own: Units, others: Units) -> Self:
        """That of two models on the same rows, in the same order."""
        apart = [(s - other, n) for (s, n), (other, _) in zip(own, others, strict=True)]
        return cls(mean(apart), ratio_interval(apart))

    @property
    def above(self) -> bool:
        """Whether the interval lies above 0."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def below(self) -> bool:
        """Whether the interval lies below 0."""
        return self.interval is not None and self.interval[1] < 0

    def __str__(self) -> str:
        low_high = "" if self.interval is None else f" (95%: {within(self.interval, '+.4g')})"
        return f"{self.mean:+.4g}{low_high}"


def mean(units: Units) -> float:
    """The mean over all that the rows' sums are over."""
    return sum(s for s, _ in units) / sum(n for _, n in units)


def within(interval: Interval, form: str) -> str:
    """An interval as people read it."""
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def by_method(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """The figures of each method, over its seeds."""
    return [list(seeds) for _, seeds in groupby(measurements, lambda one: one.name)]


def units_of(seeds: Sequence[Measurement]) -> Units:
    """The summed loss or the reward of each row, as the mean over the seeds of one method."""
    each = [one.row_losses or [(r, 1) for r in one.prompt_rewards] for one in seeds]
    return [(fmean(s for s, _ in of), of[0][1]) for of in zip(*each, strict=True)]


def held_out(measurements: Sequence[Measurement]) -> dict[str, Units]:
    """The units of each method, the base's among them."""
    return {seeds[0].name: units_of(seeds) for seeds in by_method(measurements)}


def alike(measurements: Sequence[Measurement]) -> list[list[str]]:
    """The names of lines whose losses are the same number on every row: what they differ in did
    nothing.
    """
    found: dict[tuple[tuple[float, int], ...], list[str]] = {}
    for name, units in held_out(measurements).items():
        found.setdefault(tuple(units), []).append(name)
    lower = lower_is_better(measurements)  # rewards are few numbers, and the same by chance
    return [names for names in found.values() if lower and len(names) > 1]


def lower_is_better(measurements: Sequence[Measurement]) -> bool:
    """Whether losses are compared, and not rewards."""
    return measurements[0].loss is not None


def over_base(measurements: Sequence[Measurement]) -> dict[str, Difference]:
    """By how much each method's reward is above the base's, or its loss, where below 0 is better;
    empty where the base was not measured.
    """
    found = held_out(measurements)
    base = found.pop(BASE, None)
    return {} if base is None else {m: Difference.of(own, base) for m, own in found.items()}


def verdict(measurements: Sequence[Measurement]) -> str:
    """The best method where the held-out rows tell it from all others, else those among which they
    can't tell; and whether they tell it from the base. Empty without the base.
    """
    found, gains = held_out(measurements), over_base(measurements)
    if not gains:
        return ""
    lower = lower_is_better(measurements)
    what = "lowest held-out loss" if lower else "highest held-out reward"
    rows, from_base = ("rows", "against") if lower else ("prompts", "over")

    def better(difference: Difference) -> bool:
        return difference.below if lower else difference.above

    order = sorted(gains, key=lambda method: mean(found[method]), reverse=not lower)
    best, *others = order
    told = [m for m in others if better(Difference.of(found[best], found[m]))]
    alike = [m for m in others if m not in told]
    if not alike:
        said = f"{what}: {best}, {gains[best]} {from_base} the base, paired by {rows}"
        doubt = ", which does not tell it from the base"
        return said if better(gains[best]) else said + doubt
    said = f"no best method: {best} has the {what}, and in pairs these {rows} don't tell it from"
    said += f" {', '.join(alike)}"
    unsure = [m for m in (best, *alike) if not better(gains[m])]
    return said + (f"; nor {', '.join(unsure)} from the base" if unsure else "")
