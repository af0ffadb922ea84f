"""Paired tests of which method is best, over held-out rows and seeds.

    d = sum_i (s_i - s'_i) / sum_i n_i      s_i and s'_i: the summed losses of row i over its n_i
                                            tokens, of two methods or of a method and the base; or
                                            the mean rewards of prompt i, n_i = 1; means over S
                                            and S' seeds
    var(d) = R + var_s(l_s) / S + var_s(l'_s) / S'
                                            R: `ratio_interval`'s variance over rows,
                                            l_s: the mean loss of a method under seed s

A hard row is hard for all methods, so the interval of a difference is narrower than the intervals
of the two losses. The variances over rows and over seeds are added, which counts the variance of a
row under a seed twice, as a crossed bootstrap does. The quantile is Student's with the degrees of
freedom of Satterthwaite (1946) and Welch (1947). With fewer than MIN_SEEDS seeds, intervals are
over rows only, and no method is called the best.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, takewhile
from statistics import fmean
from typing import Self

import numpy as np

from lorafold.comparing.measure import BASE, Measurement, Measurements
from lorafold.core.anatomy import grouped
from lorafold.evaluation.intervals import (
    Interval,
    loss_interval,
    ratio_interval,
    student,
    two_sided,
)
from lorafold.files.templates import interval_text, render_text

MIN_SEEDS = 3  # required for a verdict
MIN_ROWS = 20  # held-out rows required for validation rows
RowSums = Sequence[tuple[float, int]]  # (sum, count) of each row


@dataclass(frozen=True)
class Difference:
    """A mean or mean difference, its 95% interval (None for one row), and its p-value."""

    mean: float
    interval: Interval | None
    p: float = 1.0

    @classmethod
    def of(cls, first: Measurements, second: Measurements = ()) -> Self:
        """The mean loss or reward of one method over its seeds, or the difference between two
        methods on the same rows.
        """
        sums = [
            np.array([[s for s, _ in row_sums(one)] for one in of]) for of in (first, second) if of
        ]
        n = np.array([n for _, n in row_sums(first[0])])
        differences = sums[0].mean(0) - (sums[1].mean(0) if second else 0)
        rows, mean = len(n), float(differences.sum() / n.sum())
        if rows < 2:
            return cls(mean, None)
        terms = [(rows / (rows - 1) * float(((differences - mean * n) ** 2).sum()), rows - 1)]
        terms += [(x.sum(1).var(ddof=1) / len(x), len(x) - 1) for x in sums if len(x) >= MIN_SEEDS]
        total = sum(v for v, _ in terms)
        if not total:
            return cls(mean, (mean, mean), float(not mean))
        error, df = math.sqrt(total) / float(n.sum()), total**2 / sum(v**2 / f for v, f in terms)
        half = student(df + 1) * error
        return cls(mean, (mean - half, mean + half), two_sided(abs(mean) / error, df))

    def __str__(self) -> str:
        return f"{self.mean:+.4g}{interval_text(self.interval, '+.4g')}"


def by_name(measurements: Measurements) -> dict[str, list[Measurement]]:
    return {name: list(seeds) for name, seeds in groupby(measurements, lambda one: one.name)}


def row_sums(one: Measurement) -> RowSums:
    """(summed loss, tokens) of each row, or (reward, 1) of each prompt."""
    return one.row_losses or [(reward, 1) for reward in one.prompt_rewards]


def held_out(measurements: Measurements) -> dict[str, Difference]:
    return {name: Difference.of(seeds) for name, seeds in by_name(measurements).items()}


def indistinct_methods(measurements: Measurements) -> list[list[str]]:
    """Methods with the same loss on every row, whose different settings had no effect."""
    methods = by_name(measurements).items()
    names_by_losses = grouped((tuple(s.row_losses for s in seeds), name) for name, seeds in methods)
    lower = lower_is_better(measurements)  # equal rewards may be due to chance
    return [names for names in names_by_losses.values() if lower and len(names) > 1]


def lower_is_better(measurements: Measurements) -> bool:
    return measurements[0].loss is not None


def over_base(measurements: Measurements) -> dict[str, Difference]:
    """The difference of each method from the base; empty if the base was not measured."""
    methods = by_name(measurements)
    base = methods.pop(BASE, [])
    return {m: Difference.of(seeds, base) for m, seeds in methods.items() if base}


def with_validation(measurements: Measurements) -> list[Measurement]:
    """In a sweep, a random half of the held-out rows becomes `validation`, which selects the best
    setting, and the other half is reported. With fewer than MIN_ROWS rows, nothing is changed.
    """
    count = len(row_sums(measurements[0]))
    methods, names = {one.method for one in measurements}, {one.name for one in measurements}
    if len(methods) == len(names) or count < MIN_ROWS:
        return [*measurements]
    first = {*random.Random("validation").sample(range(count), count // 2)}
    return [_split(one, first) for one in measurements]


def _split(one: Measurement, first: set[int]) -> Measurement:
    every = [*enumerate(row_sums(one))]
    validation, rest = ([u for n, u in every if (n in first) == chosen] for chosen in (True, False))
    val_mean, mean = (sum(s for s, _ in of) / sum(n for _, n in of) for of in (validation, rest))
    one = replace(one, validation=val_mean, validation_rows=len(first))
    if one.loss is not None:
        interval = loss_interval(rest)
        return replace(one, loss=mean, loss_interval=interval, row_losses=tuple(rest))
    interval, rewards = ratio_interval(rest), tuple(reward for reward, _ in rest)
    return replace(one, reward=mean, reward_interval=interval, prompt_rewards=rewards)


def distinguished_pairs(measurements: Measurements) -> set[frozenset[str]]:
    """The pairs of methods that differ significantly at 5%, with Holm's correction (1979) for the
    number of pairs.
    """
    methods = by_name(measurements)
    pairs = sorted(
        (Difference.of(methods[a], methods[b]).p, a, b) for a, b in combinations(methods, 2)
    )
    significant = takewhile(lambda at: at[1][0] * (len(pairs) - at[0]) <= 0.05, enumerate(pairs))
    return {frozenset((a, b)) for _, (_, a, b) in significant}


def verdict(measurements: Measurements) -> str:
    """Which method is best or, if the differences are not significant, which methods can't be
    distinguished; whether they differ from the base; and the selected settings of a sweep. The text
    is empty if the base was not measured.
    """
    methods, gains = by_name(measurements), over_base(measurements)
    if not gains:
        return ""
    lower, means = lower_is_better(measurements), held_out(measurements)

    def selection_score(name: str) -> float:
        values = [one.validation for one in methods[name] if one.validation is not None]
        return fmean(values) if values else means[name].mean

    order = sorted(gains, key=selection_score, reverse=not lower)
    seeds = min(len(methods[name]) for name in gains)
    pairs = distinguished_pairs(measurements) if seeds >= MIN_SEEDS else set()

    def better(one: str, other: str) -> bool:
        less = means[one].mean < means[other].mean
        return frozenset((one, other)) in pairs and less == lower

    best, *others = order
    alike = [m for m in others if not better(best, m)]
    chosen = [methods[name][0] for name in order]
    names = [one.method for one in chosen]
    swept = [m for m in dict.fromkeys(names) if names.count(m) > 1]
    return render_text(
        "comparing/verdict.jinja",
        seeds=seeds,
        needed=MIN_SEEDS,
        lower=lower,
        best=best,
        gain=gains[best],
        alike=alike,
        unsure=[m for m in (best, *alike) if not better(m, BASE)],
        settings=[chosen[names.index(m)].name for m in swept],
        validation=chosen[0].validation_rows,
        count=len(row_sums(chosen[0])),
        enough=MIN_ROWS,
    )
