"""The scores that a reward model gives rows, and how well it tells preferences.

    found = score_rows(model, tokenizer, rows, max_length)
    found.rows[0].scores       {"chosen": 1.3, "rejected": -0.2}, or {"score": 1.3} of other rows

The text of a row is what supervised training makes of it: prompt and completion, or a whole
conversation, as the chat template renders them. Each prompt of a pair is computed once, where the
model allows that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafold.data.branches import Branched, continued
from lorafold.data.examples import encode
from lorafold.data.preferred import encode_preferred
from lorafold.data.render import Rendering
from lorafold.data.rows import as_checked
from lorafold.data.shapes import PAIRS
from lorafold.data.sources import Row
from lorafold.errors import LorafoldError, listed
from lorafold.evaluation.held_out import progress_bar
from lorafold.evaluation.intervals import Interval, mean_interval
from lorafold.evaluation.rewards import RewardFigures, rank_correlation, reward_figures, scores_of
from lorafold.files.atomic import write_text
from lorafold.files.page import Shown
from lorafold.step.branches import branching
from lorafold.step.preference_laws import Reward
from lorafold.step.preferences import Preferences

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BRADLEY_TERRY = Reward()
WHOLE_CONVERSATION = Rendering("last")  # up to the last turn of the assistant


@dataclass(frozen=True)
class RowScore:
    """The scores of the row with this number, from 1, in its file, or of several files among those
    that are scored: `chosen` and `rejected`, or `score`.
    """

    row: int
    scores: dict[str, float]

    def as_json(self) -> str:
        """The row's line of a JSONL file."""
        return json.dumps({"row": self.row, **self.scores})

    def __str__(self) -> str:
        return "\t".join([str(self.row), *(f"{score:.4f}" for score in self.scores.values())])


@dataclass(frozen=True)
class ScoredRows(Shown):
    """The scores of n rows, and for pairs the figures of the preference. `score` is the mean of
    other rows, with its 95% interval (None for a single row) and Spearman's correlation of their
    scores with the tokens of their completions.
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
        """All figures, without the rows."""
        names = ("score", "score_interval", "length_correlation")
        own = {name: getattr(self, name) for name in names}
        figures = own if self.figures is None else self.figures.as_json()
        return {**figures, "n": self.n, "truncated": self.truncated}

    def write(self, path: str | Path) -> None:
        """Write one line of JSON a row. Raises LorafoldError if that fails."""
        write_text(path, "".join(f"{row.as_json()}\n" for row in self.rows))

    def __str__(self) -> str:
        if self.figures is not None:
            return str(self.figures)
        text = f"{self.n} rows: score {self.score:.4f}"
        if self.score_interval is not None:
            text += " (95%: {:.4f} to {:.4f})".format(*self.score_interval)
        return text


def score_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    *,
    console: Console | None = None,
) -> ScoredRows:
    """Score rows with a reward model and the adapters that are active on it.

    Args:
        model: A sequence classifier with one output, whose config names the token that pads.
        tokenizer: The model's, with a chat template.
        rows: Rows of one form: preferences, prompts with completions, conversations or text.
        max_length: Longer texts are cut to this many tokens, and counted.
        console: For progress and a report of what was cut; None is quiet.

    Raises LorafoldError for bad rows, for a model that is no reward model, and for scores that are
    not finite.
    """
    text = model.config.get_text_config()
    if model.config.num_labels != 1 or model.get_output_embeddings() is not None:
        raise LorafoldError(
            f"{type(model).__name__} with {model.config.num_labels} outputs: expected a reward"
            " model, a sequence classifier with num_labels 1"
        )
    if text.pad_token_id is None:
        raise LorafoldError(
            "the model's config: field pad_token_id: found null, expected the id of the token that"
            " pads short texts"
        )
    rows = as_checked(rows, PAIRS)
    paired = rows.give(PAIRS)
    if paired:
        data = encode_preferred(rows, tokenizer, max_length, PAIRS, console)
        examples: Sequence[Branched] = data.examples
        report, truncated = str(data.report), data.report.truncated
    else:
        examples, report, truncated = whole_texts(rows, tokenizer, max_length, console)
    names = ("chosen", "rejected") if paired else ("score",)
    if console and truncated:
        console.print(report, highlight=False)
    with branching(model, across=True) as how, progress_bar(console, "rows") as step:
        loss = Preferences(model, BRADLEY_TERRY, how, text.pad_token_id)
        scores, tokens = scores_of(loss, examples, step)
    if bad := np.flatnonzero(~np.isfinite(scores).all(1)).tolist():
        raise LorafoldError(
            f"row {bad[0] + 1}: found the score {scores[bad[0]].tolist()}, expected a finite"
            " number; check the weights of the model and its adapters"
        )
    places = rows.origins.places(range(len(rows)))  # rows before may be left out
    alone = len({place.file for place in places}) == 1
    by_row = tuple(
        RowScore(place.row if alone else n, dict(zip(names, found, strict=True)))
        for n, (place, found) in enumerate(zip(places, scores.tolist(), strict=True), 1)
    )
    if not paired:
        each = scores[:, 0].tolist()
        bias = rank_correlation(scores[:, 0], tokens[:, 0])
        return ScoredRows(by_row, None, truncated, fmean(each), mean_interval(each), bias)
    return ScoredRows(by_row, reward_figures(scores, tokens), truncated)


def whole_texts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    console: Console | None,
) -> tuple[list[Branched], str, int]:
    """(one example a row with a single branch, the report, how many were cut).

    Args:
        rows: Conversations, prompts with completions, or text.
        tokenizer: With a chat template.
        max_length: To which longer texts are cut.

    Raises LorafoldError for rows without a turn of the assistant within `max_length`.
    """
    data = encode(rows, tokenizer, max_length, console, WHOLE_CONVERSATION)
    found = dict(zip(data.examples.rows.tolist(), data.examples, strict=True))
    if missing := [n + 1 for n in range(len(rows)) if n not in found]:
        raise LorafoldError(
            f"data: rows {listed(missing)}: found no turn of the assistant within max_length"
            f" {max_length}, expected one to score"
        )
    examples = [continued(found[n]) for n in range(len(rows))]
    return examples, str(data.report), data.report.truncated
