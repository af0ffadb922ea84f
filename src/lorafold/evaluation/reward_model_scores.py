"""Scores of a reward model, and its accuracy and calibration on n pairs.

    d = r(chosen) - r(rejected)         the margin of a pair
    accuracy                            the share of pairs with d > 0
    log loss, Brier score               the means of -log s(d) and (1 - s(d))^2, s the logistic
                                        function: s(d) is the model's probability of the preference
                                        (Bradley and Terry 1952; Brier 1950)
    calibration                         for pairs with confidence c = s(|d|), the accuracy, which is
                                        c for a calibrated model
    calibration error                   sum_b n_b / n |accuracy_b - mean c_b| over bins b of c (Guo
                                        et al. 2017, arXiv 1706.04599, eq. 3)
    length correlation                  Spearman's, between scores and lengths of completions

Texts are rendered as in supervised training. A model that prefers long completions is right
whenever the chosen completion is longer, so accuracy is also computed separately for pairs with a
longer and with a shorter chosen completion (Singhal et al. 2023, arXiv 2310.03716). All intervals
are 95% confidence intervals.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafold.core.contexts import evaluating
from lorafold.data.arrow import Array
from lorafold.data.examples import encode
from lorafold.data.formats import PAIRS
from lorafold.data.json_input import Row
from lorafold.data.preference_examples import BranchedRow, encode_preferences, split_completion
from lorafold.data.render import Rendering
from lorafold.data.rows import to_rows
from lorafold.errors import LorafoldError, listed
from lorafold.evaluation.batched_losses import pad_id_of
from lorafold.evaluation.intervals import Interval, mean_interval, wilson
from lorafold.files.atomic import write_text
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.templates import render_text, with_interval
from lorafold.files.terminal import Progress, no_progress, print_lines, progress_bar
from lorafold.training_step.preference_algorithms import BradleyTerry
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BINS = 10  # bins of c, from 0.5 to 1
BRADLEY_TERRY = BradleyTerry()
WHOLE_CONVERSATION = Rendering("last")  # up to the last assistant turn


@dataclass(frozen=True)
class Share:
    """The accuracy on n pairs and its 95% interval; both are None without pairs."""

    n: int
    accuracy: float | None
    accuracy_interval: Interval | None

    @classmethod
    def of(cls, right: Array) -> Share:
        """Counts the pairs that the model ranks correctly, given as booleans (n,)."""
        n, hits = len(right), int(right.sum())
        return cls(n, hits / n if n else None, wilson(hits, n) if n else None)

    def __str__(self) -> str:
        return "none" if self.accuracy is None else with_interval(self, "accuracy", ".1%")


@dataclass(frozen=True)
class Bin:
    """Pairs with confidence from `low` to `high`: their mean confidence, number and accuracy."""

    low: float
    high: float
    confidence: float
    observed: Share

    def as_json(self) -> dict[str, Any]:
        figures = asdict(self)
        return figures | figures.pop("observed")


@dataclass(frozen=True)
class RewardFigures:
    """Accuracy and calibration of a reward model on pairs; `right` is the accuracy on all pairs.

    `log_loss` is in nats. `length_correlation` is None if all scores or all lengths are equal, and
    `margin_interval` is None for a single pair.
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
        """Returns all figures."""
        figures = asdict(self) | {"calibration": [one.as_json() for one in self.calibration]}
        return figures.pop("right") | figures

    @property
    def summary(self) -> str:
        """Accuracy and margin, in one line."""
        return f"accuracy {self.right}, margin {with_interval(self, 'margin', '.3f')}"

    def __str__(self) -> str:
        return render_text("evaluation/pairs.jinja", figures=self)


def scores_of(
    loss: Preferences, examples: Sequence[BranchedRow], progress: Progress = no_progress
) -> tuple[Array, Array]:
    """Returns the score (fp32) and the number of tokens of each completion, both (n, k)."""
    shape, done = (len(examples), len(examples[0].branches)), 0
    scores, tokens = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    with evaluating(loss):
        for group in loss.groups(examples):
            scored = loss.scored([examples[i] for i in group])
            scores[group], tokens[group] = scored.logps.cpu(), scored.tokens.cpu()
            progress(done := done + len(group), len(examples))
    return scores, tokens


def reward_figures(scores: Array, tokens: Array) -> RewardFigures:
    """Computes the figures of pairs (n, 2); the first completion of each pair is chosen."""
    chosen, rejected = scores.astype(np.float64).T
    d, longer = chosen - rejected, tokens[:, 0] - tokens[:, 1]
    right = d > 0
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    probability = np.where(d >= 0, confidence, 1 - confidence)  # s(d)
    bin_of = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = tuple(
        Bin(0.5 + b / (2 * BINS), 0.5 + (b + 1) / (2 * BINS), float(confidence[bin_of == b].mean()),
            Share.of(right[bin_of == b]))
        for b in np.unique(bin_of).tolist()
    )  # fmt: skip
    return RewardFigures(
        right=Share.of(right),
        margin=float(d.mean()),
        margin_interval=mean_interval(d.tolist()),
        chosen_score=float(chosen.mean()),
        rejected_score=float(rejected.mean()),
        log_loss=float(np.logaddexp(0, -d).mean()),
        brier=float(((1 - probability) ** 2).mean()),
        # weighted mean difference between accuracy and confidence
        calibration_error=sum(
            one.observed.n * abs((one.observed.accuracy or 0.0) - one.confidence) for one in bins
        )
        / len(d),
        calibration=bins,
        length_correlation=rank_correlation(scores.ravel(), tokens.ravel()),
        chosen_longer=Share.of(right[longer > 0]),
        chosen_shorter=Share.of(right[longer < 0]),
    )


def rank_correlation(x: Array, y: Array) -> float | None:
    """Spearman's rank correlation of x (n,) and y (n,), with mean ranks for ties; None if all
    values of either are equal.
    """
    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else None


def ranks(x: Array) -> Array:
    """Ranks of x (n,) from 1; ties have the mean rank."""
    _, number, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[number]


@dataclass(frozen=True)
class RowScore:
    """The scores of a row: `chosen` and `rejected` of a pair, or `score`. `row` is its number from
    1 in the file or, with several files, among all scored rows.
    """

    row: int
    scores: dict[str, float]

    def as_json(self) -> str:
        return json.dumps({"row": self.row, **self.scores})

    def __str__(self) -> str:
        return "\t".join([str(self.row), *(f"{score:.4f}" for score in self.scores.values())])


@dataclass(frozen=True)
class ScoredRows(ShownInNotebooks):
    """The scores of a reward model on n rows.

    Attributes:
        rows: The scores of each row.
        figures: Accuracy and calibration on pairs; None for other rows.
        truncated: The number of truncated texts.
        score: The mean score; None for pairs.
        score_interval: The 95% interval of the mean score; None for pairs or a single row.
        length_correlation: Spearman's correlation of scores with completion lengths.
    """

    rows: tuple[RowScore, ...]
    figures: RewardFigures | None
    truncated: int
    score: float | None = None
    score_interval: Interval | None = None
    length_correlation: float | None = None

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def as_json(self) -> dict[str, Any]:
        """Returns all figures, without the rows."""
        names = ("score", "score_interval", "length_correlation")
        mean = {name: getattr(self, name) for name in names}
        figures = mean if self.figures is None else self.figures.as_json()
        return {**figures, "n": self.n, "truncated": self.truncated}

    def write(self, path: str | Path) -> None:
        """Writes a JSONL file with a line per row."""
        write_text(path, "".join(f"{row.as_json()}\n" for row in self.rows))

    def __str__(self) -> str:
        if self.figures is not None:
            return str(self.figures)
        return f"{self.n} rows: score {with_interval(self, 'score', '.4f')}"


def score_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row],
    max_length: int, *, console: Console | None = None,
) -> ScoredRows:  # fmt: skip
    """Scores rows with a reward model and its active adapters."""
    if model.config.num_labels != 1 or model.get_output_embeddings() is not None:
        raise LorafoldError(
            f"{type(model).__name__} with num_labels {model.config.num_labels}: not a reward model,"
            " which is a sequence classifier with num_labels 1"
        )
    pad_id = pad_id_of(model)
    rows = to_rows(rows, PAIRS)
    paired = rows.provides(PAIRS)
    data: Any
    if paired:
        data = encode_preferences(rows, tokenizer, max_length, PAIRS, console)
        examples = data.examples
    else:
        data = encode(rows, tokenizer, max_length, console, WHOLE_CONVERSATION)
        texts = dict(zip(data.examples.rows.tolist(), data.examples, strict=True))
        if missing := [n + 1 for n in range(len(rows)) if n not in texts]:
            raise LorafoldError(
                f"data: rows {listed(missing)}: found no assistant turn within max_length"
                f" {max_length}, expected one to score"
            )
        examples = [split_completion(texts[n]) for n in range(len(rows))]
    names = ("chosen", "rejected") if paired else ("score",)
    truncated = data.report.truncated
    if console and truncated:
        print_lines(console, data.report)
    with sharing_prefixes(model, across=True) as support, progress_bar(console, "rows") as step:
        loss = Preferences(model, BRADLEY_TERRY, support, pad_id)
        scores, tokens = scores_of(loss, examples, step)
    if bad := np.flatnonzero(~np.isfinite(scores).all(1)).tolist():
        raise LorafoldError(
            f"row {bad[0] + 1}: found the score {scores[bad[0]].tolist()}, expected a finite"
            " number; check the weights of the model and its adapters"
        )
    places = rows.origins.places(range(len(rows)))  # numbers in the file, including skipped rows
    alone = len({place.file for place in places}) == 1
    by_row = tuple(
        RowScore(place.row if alone else n, dict(zip(names, row_scores, strict=True)))
        for n, (place, row_scores) in enumerate(zip(places, scores.tolist(), strict=True), 1)
    )
    if not paired:
        each = scores[:, 0].tolist()
        bias = rank_correlation(scores[:, 0], tokens[:, 0])
        return ScoredRows(by_row, None, truncated, fmean(each), mean_interval(each), bias)
    return ScoredRows(by_row, reward_figures(scores, tokens), truncated)
