"""How well a reward model tells chosen completions from rejected ones, from the scores of n pairs.

    d = r(chosen) - r(rejected)         the margin of a pair
    accuracy                            the share of pairs with d > 0
    log loss, Brier score               the means of -log s(d) and (1 - s(d))^2, s the logistic
                                        function: s(d) is the probability that the model gives to
                                        the preference (Bradley and Terry 1952; Brier 1950)
    calibration                         of the pairs that the model is sure of to c = s(|d|), the
                                        share in which it is right: c, if it is calibrated
    calibration error                   sum_b n_b / n |share_b - mean c_b| over bins b of c (Guo et
                                        al. 2017, arXiv 1706.04599, eq. 3)
    length correlation                  Spearman's, of the scores with the lengths of completions

A model that prefers length gets pairs right where the chosen completion is the longer one, and
wrong where it is the shorter one, so accuracy is given for both apart (Singhal et al. 2023, arXiv
2310.03716). Intervals are 95%.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lorafold.core.modes import evaluating
from lorafold.data.arrow import Array
from lorafold.data.branches import Branched
from lorafold.evaluation.intervals import Interval, mean_interval, wilson
from lorafold.step.preferences import Preferences

BINS = 10  # of c, from a half to 1


@dataclass(frozen=True)
class Share:
    """The share of n pairs that the model gets right; None for no pair."""

    n: int
    accuracy: float | None
    accuracy_interval: Interval | None

    @classmethod
    def of(cls, right: Array) -> Share:
        """Of pairs that the model gets right or not, (n,)."""
        n, hits = len(right), int(right.sum())
        return cls(n, hits / n if n else None, wilson(hits, n) if n else None)

    def __str__(self) -> str:
        if self.accuracy is None or self.accuracy_interval is None:
            return "none"
        low, high = self.accuracy_interval
        return f"{self.accuracy:.1%} (95%: {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class Bin:
    """The pairs that the model is sure of to between `low` and `high`: how many, how sure on
    average, and the share that it gets right.
    """

    low: float
    high: float
    confidence: float
    observed: Share

    def as_json(self) -> dict[str, Any]:
        """The bin in one object."""
        return {"low": self.low, "high": self.high, "confidence": self.confidence} | asdict(
            self.observed
        )


@dataclass(frozen=True)
class RewardFigures:
    """The figures of n pairs. A correlation is None where scores or lengths are all equal, an
    interval where there is a single pair. `log_loss` is in nats.
    """

    right: Share
    margin: float
    margin_interval: Interval | None
    chosen_score: float
    rejected_score: float
    log_loss: float
    brier: float
    calibration_error: float
    calibration: tuple[Bin, ...]
    length_correlation: float | None
    chosen_longer: Share
    chosen_shorter: Share

    def as_json(self) -> dict[str, Any]:
        """All figures, by name."""
        found = asdict(self)
        del found["right"]
        found["calibration"] = [one.as_json() for one in self.calibration]
        return asdict(self.right) | found

    @property
    def told(self) -> str:
        """Accuracy and margin, in one line."""
        margin = f"margin {self.margin:.3f}"
        if self.margin_interval is not None:
            low, high = self.margin_interval
            margin += f" (95%: {low:.3f} to {high:.3f})"
        return f"accuracy {self.right}, {margin}"

    def __str__(self) -> str:
        correlation = self.length_correlation
        lines = [
            f"{self.right.n} pairs: {self.told}",
            f"log loss {self.log_loss:.4f}, Brier score {self.brier:.4f}, calibration error"
            f" {self.calibration_error:.4f}; sure of it, and right:",
            *(
                f"  {one.low:.2f} to {one.high:.2f}: {one.observed.n:5d} pairs, sure to"
                f" {one.confidence:.1%}, right in {one.observed}"
                for one in self.calibration
            ),
            "length: correlation with the score "
            + ("none" if correlation is None else f"{correlation:+.3f}")
            + f"; accuracy where the chosen completion is longer {self.chosen_longer} of"
            f" {self.chosen_longer.n}, shorter {self.chosen_shorter} of {self.chosen_shorter.n}",
        ]
        return "\n".join(lines)


def scores_of(
    loss: Preferences,
    examples: Sequence[Branched],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Array, Array]:
    """The scores of the examples' documents, in fp32, and the tokens of their completions, both
    (n, k).

    Args:
        loss: Has the model, with the adapters that are active on it.
        progress: Is told how many examples are done, of how many.
    """
    shape, done = (len(examples), len(examples[0].branches)), 0
    scores, tokens = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    with evaluating(loss):
        for group in loss.groups(examples):
            found = loss.scored([examples[i] for i in group])
            scores[group], tokens[group] = found.logps.cpu(), found.tokens.cpu()
            progress(done := done + len(group), len(examples))
    return scores, tokens


def reward_figures(scores: Array, tokens: Array) -> RewardFigures:
    """The figures of pairs whose first completion is the chosen one.

    Args:
        scores: Of both completions, (n, 2).
        tokens: Of both completions, (n, 2).
    """
    chosen, rejected = scores.astype(np.float64).T
    d, longer = chosen - rejected, tokens[:, 0] - tokens[:, 1]
    right = d > 0
    sure = 1 / (1 + np.exp(-np.abs(d)))
    likely = np.where(d >= 0, sure, 1 - sure)  # s(d)
    number = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = tuple(
        Bin(0.5 + b / (2 * BINS), 0.5 + (b + 1) / (2 * BINS), float(sure[number == b].mean()),
            Share.of(right[number == b]))
        for b in np.unique(number).tolist()
    )  # fmt: skip
    return RewardFigures(
        right=Share.of(right),
        margin=float(d.mean()),
        margin_interval=mean_interval(d.tolist()),
        chosen_score=float(chosen.mean()),
        rejected_score=float(rejected.mean()),
        log_loss=float(np.logaddexp(0, -d).mean()),
        brier=float(((1 - likely) ** 2).mean()),
        calibration_error=calibration_error(bins),
        calibration=bins,
        length_correlation=rank_correlation(scores.ravel(), tokens.ravel()),
        chosen_longer=Share.of(right[longer > 0]),
        chosen_shorter=Share.of(right[longer < 0]),
    )


def calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance of the share that is right from how sure the model is, over pairs."""
    off = [one.observed.n * abs((one.observed.accuracy or 0.0) - one.confidence) for one in bins]
    return sum(off) / sum(one.observed.n for one in bins)


def rank_correlation(x: Array, y: Array) -> float | None:
    """Spearman's rank correlation of x (n,) and y (n,), with mean ranks for equal values; None
    where all values of either are equal.
    """
    a, b = ranks(x), ranks(y)
    if not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def ranks(x: Array) -> Array:
    """The ranks of x (n,), from 1; equal values have the mean of theirs."""
    _, number, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: Array = (last - (counts - 1) / 2)[number]
    return found
