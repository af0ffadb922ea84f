"""The result of a fragility study: the metrics of each stack before tuning and after each tuning
run, and curves over the number of benign examples.

    kept        (after - without) / (before - without), of the log-odds of refusal; without is the
                same model without the alignment, or 0 without adapters; 1 means unchanged
    halved at   the number k of examples at which kept falls to 1/2, interpolated linearly in
                log(1 + k) between measured points, from k = 0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from statistics import fmean
from typing import Any, NamedTuple, Self

from lorafold.core.anatomy import grouped
from lorafold.errors import LorafoldError
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.templates import render_text
from lorafold.fragility_study.defences import Overlap
from lorafold.fragility_study.measure import RefusalMetrics, StackMetrics, TunedMetrics


class TuningSetting(NamedTuple):
    """An adapter stack, and the defence, rank and learning rate of its tuning."""

    stack: str
    defence: str = "none"
    rank: int | None = None
    lr: float | None = None

    def __str__(self) -> str:
        return f"{self.stack}, {self.defence}, rank {self.rank}, rate {self.lr:g}"


@dataclass(frozen=True)
class Point:
    """The metrics after one tuning run, with a defence or with none.

    Attributes:
        way: The stack, defence, rank and learning rate.
        seed: The seed of the tuning; None for a finished adapter.
        examples: The number of benign examples; None for a finished adapter.
        kept: The remaining share of the log-odds that the alignment added; None if it added none.
        measured: The metrics of the tuned model.
        overlap: The share of the tuning's energy in the alignment's directions.
    """

    way: TuningSetting
    seed: int | None
    examples: int | None
    kept: float | None
    measured: RefusalMetrics
    overlap: Overlap | None

    @classmethod
    def of(
        cls,
        way: TuningSetting,
        seed: int | None,
        examples: int | None,
        stack: StackMetrics,
        after: TunedMetrics,
    ) -> Self:
        kept = stack.kept(after.measured.log_odds)
        return cls(way, seed, examples, kept, after.measured, after.overlap)

    def as_json(self) -> dict[str, Any]:
        """All figures in one flat object."""
        content = asdict(self)
        way, measured, overlap = (content.pop(name) for name in ("way", "measured", "overlap"))
        return {**way._asdict(), **content, **measured, "overlap": overlap}


@dataclass(frozen=True)
class Curve:
    """The points of one tuning setting, by number of examples and seed, and the metrics of the
    stack before tuning.
    """

    way: TuningSetting
    stack: StackMetrics
    points: tuple[Point, ...]

    @property
    def by_examples(self) -> dict[int, list[Point]]:
        """The points of all seeds, by number of examples."""
        ordered = sorted(self.points, key=lambda p: (p.examples or 0, p.seed or 0))
        return grouped((one.examples or 0, one) for one in ordered)

    def halved_at(self, seed: int | None = None) -> float | None:
        """The number of examples that halves the log-odds of one seed, or of the mean over seeds;
        None if no number does.
        """
        means = [
            (k, fmean(p.kept for p in points if p.kept is not None))
            for k, same_k in self.by_examples.items()
            if (points := [p for p in same_k if seed in (None, p.seed) and p.kept is not None])
        ]
        return crossing([(0, 1.0), *means], 0.5)

    def __str__(self) -> str:
        return f"{self.way}: {self.halved}"

    @property
    def halved(self) -> str:
        """The number of examples that halves the log-odds, in words."""
        largest = max(self.by_examples)
        if self.stack.kept(0) is None:
            return "the alignment did not raise the log-odds"
        halving = self.halved_at()
        count = f"{largest} examples" if halving is None else f"{halving:.3g} examples"
        return f"{'not ' * (halving is None)}halved by {count}"

    def as_json(self) -> dict[str, Any]:
        """The setting, and the number of examples that halves the log-odds, for the mean and by
        seed.
        """
        seeds = sorted({p.seed for p in self.points if p.seed is not None})
        each = {str(seed): self.halved_at(seed) for seed in seeds}
        return {**self.way._asdict(), "halved_at": self.halved_at(), "halved_at_by_seed": each}


def crossing(points: Sequence[tuple[int, float]], level: float) -> float | None:
    """The k at which a value first falls to a level, interpolated linearly in log(1 + k); None if
    it never does.
    """
    for (k, above), (next_k, below) in pairwise(points):
        if above > level >= below:
            start, end = math.log1p(k), math.log1p(next_k)
            return math.expm1(start + (end - start) * (above - level) / (above - below))
    return None


@dataclass(frozen=True)
class Fragility(ShownInNotebooks):
    """The result of a fragility study: the metrics of each stack before tuning, by name, and the
    points after each tuning.
    """

    model: str
    source: str
    stacks: dict[str, StackMetrics]
    points: tuple[Point, ...]

    @property
    def curves(self) -> list[Curve]:
        """The curves of all tuning settings; none for a finished adapter."""
        tuned = [p for p in self.points if p.examples is not None]
        ways = [p.way for p in tuned]
        ordered = sorted(tuned, key=lambda p: ways.index(p.way))
        return [
            Curve(way, self.stacks[way.stack], tuple(points))
            for way, points in groupby(ordered, key=lambda p: p.way)
        ]

    @property
    def notes(self) -> list[str]:
        """Sentences about stacks whose alignment did not raise the log-odds, or which refused
        nothing before tuning.
        """
        notes = []
        for name, stack in self.stacks.items():
            if stack.kept(0) is None:
                notes.append(f"{name}: the alignment did not raise the log-odds: nothing to erode.")
            elif not stack.before.refusals:
                notes.append(f"{name}: no refusals before the tuning; compare only the log-odds.")
        return notes

    def under(self, least: float) -> str | None:
        """A message if a finished adapter keeps less than `least` of the log-odds, else None."""
        [point], [stack] = self.points, self.stacks.values()
        odds = (
            f"{stack.reference:+.2f} without the alignment, {stack.before.log_odds:+.2f} with it,"
            f" {point.measured.log_odds:+.2f} after"
        )
        if point.kept is None:
            raise LorafoldError(
                f"log-odds of refusal: found {odds}; expected the alignment to raise them. Choose"
                " other refusal or compliance prefixes"
            )
        if point.kept >= least:
            return None
        return (
            f"kept {point.kept:.2f} of the alignment's effect on the log-odds of refusal ({odds}),"
            f" expected at least {least:g}"
        )

    def __str__(self) -> str:
        return render_text("fragility_study/fragility.jinja", study=self)

    def as_json(self) -> dict[str, Any]:
        """All figures, under the keys of `lorafold lab fragility --json`."""
        return {
            "model": self.model,
            "data": self.source,
            "stacks": {name: asdict(content) for name, content in self.stacks.items()},
            "points": [one.as_json() for one in self.points],
            "curves": [curve.as_json() for curve in self.curves],
        }
