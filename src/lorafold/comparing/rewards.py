"""Which method trains the best policy: held-out rewards, paired by prompts.

    d_i = r_i - r'_i            r_i and r'_i are the mean rewards of prompt i, over its completions
                                and over the seeds, of two methods or of a method and the base

A hard prompt is hard for all, so the interval of a difference, whose units are prompts, is narrower
than those of the two rewards. It says nothing of how far seeds differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Self

from lorafold.comparing.measure import BASE, Measurement
from lorafold.evaluation import Interval
from lorafold.evaluation.intervals import mean_interval


@dataclass(frozen=True)
class Difference:
    """A mean difference of rewards and its 95% interval; None for a single prompt."""

    mean: float
    interval: Interval | None

    @classmethod
    def of(cls, rewards: Sequence[float], others: Sequence[float]) -> Self:
        """That of two models on the same prompts, in the same order."""
        apart = [own - other for own, other in zip(rewards, others, strict=True)]
        return cls(fmean(apart), mean_interval(apart))

    @property
    def above(self) -> bool:
        """Whether the interval lies above 0."""
        return self.interval is not None and self.interval[0] > 0

    def __str__(self) -> str:
        low_high = "" if self.interval is None else f" (95%: {within(self.interval, '+.4g')})"
        return f"{self.mean:+.4g}{low_high}"


def within(interval: Interval, form: str) -> str:
    """An interval as people read it."""
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def by_method(measurements: Sequence[Measurement]) -> list[list[Measurement]]:
    """The figures of each method, over its seeds."""
    return [list(seeds) for _, seeds in groupby(measurements, lambda one: one.method)]


def of_prompts(seeds: Sequence[Measurement]) -> list[float]:
    """The reward of each prompt, as the mean over the seeds of one method."""
    return [fmean(of) for of in zip(*(one.prompt_rewards for one in seeds), strict=True)]


def rewards_of(measurements: Sequence[Measurement]) -> dict[str, list[float]]:
    """The rewards of prompts by method, the base's among them; none where there are losses."""
    found = {seeds[0].method: of_prompts(seeds) for seeds in by_method(measurements)}
    return {method: rewards for method, rewards in found.items() if rewards}


def over_base(measurements: Sequence[Measurement]) -> dict[str, Difference]:
    """By how much each method's reward is above the base's."""
    found = rewards_of(measurements)
    base = found.pop(BASE, None)
    return {} if base is None else {m: Difference.of(own, base) for m, own in found.items()}


def verdict(measurements: Sequence[Measurement]) -> str:
    """The method of the highest reward, and which ones the prompts don't tell from it; empty where
    there are losses.
    """
    found, gains = rewards_of(measurements), over_base(measurements)
    if not gains:
        return ""
    best = max(gains, key=lambda method: fmean(found[method]))
    told = f"highest held-out reward: {best}, {gains[best]} over the base, paired by prompts"
    if not gains[best].above:
        told += ", which does not tell it from the base"
    others = [m for m in gains if m != best and not Difference.of(found[best], found[m]).above]
    return told + (f"; not told from {best}: {', '.join(others)}" if others else "")
