"""Evaluation on held-out rows: loss, perplexity and exact match, with 95% intervals.

    loss = sum_i s_i / sum_i n_i          s_i is the summed loss of row i in nats, over its n_i
                                          labelled tokens; perplexity = exp(loss)

Exact match is the share of greedy completions that equal the reference, ignoring surrounding
whitespace. For a classifier, it is the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.core.attach import selection_of
from lorafold.data.batches import num_targets
from lorafold.data.classification import LabelledExample, encode_labelled
from lorafold.data.examples import encode
from lorafold.data.formats import CONVERSATIONS, LABELS, PAIRS
from lorafold.data.json_input import Row
from lorafold.data.preference_examples import encode_preferences
from lorafold.data.prompts import references, without_reasoning
from lorafold.data.row_store import Rows
from lorafold.data.rows import to_rows
from lorafold.errors import truncate
from lorafold.evaluation.batched_losses import measure_rows, pad_id_of, row_losses
from lorafold.evaluation.intervals import Interval, loss_interval, mean_loss, wilson
from lorafold.evaluation.preference_metrics import PreferenceFigures, preference_figures
from lorafold.files.html_page import ShownInNotebooks
from lorafold.files.templates import render_text
from lorafold.files.terminal import print_lines, progress_bar
from lorafold.generation import complete
from lorafold.training_step.classification_loss import Classification
from lorafold.training_step.preference_algorithms import Dpo, Law
from lorafold.training_step.preference_loss import Preferences
from lorafold.training_step.shared_prefixes import sharing_prefixes

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DPO = Dpo()
EXTRA_TOKENS = 8  # tokens beyond the longest reference, so that longer completions are detected


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation on held-out rows: the loss in nats, other figures, their text
    (`details`), and sample completions as JSON.
    """

    loss: float
    figures: Mapping[str, Any] = field(default_factory=dict)
    details: str = ""
    samples: Sequence[Mapping[str, Any]] = ()

    def __str__(self) -> str:
        return f"held-out loss {self.loss:.4f}{self.details}"


@dataclass(frozen=True)
class Answer:
    """The model's answer to one row.

    Attributes:
        prompt: The last message before the completion, or the text for a classifier.
        reference: The expected completion or class.
        answer: The model's completion or class.
    """

    prompt: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        """Whether the completion equals the reference, ignoring surrounding whitespace."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Evaluation(ShownInNotebooks):
    """Loss and exact match on n rows. For preference data, both are computed from the chosen
    completions.

    Attributes:
        loss: The mean loss in nats per labelled token; for a classifier, per text.
        loss_interval: The 95% interval of the loss; None for a single row.
        exact_match: The share of answers that equal their reference; None without completions.
        rows: The model's answer to each row.
        preference: Preference accuracy, margins and KL; None for other data.
        losses: (summed loss, number of labelled tokens) of each row.
    """

    loss: float
    loss_interval: Interval | None
    exact_match: float | None
    exact_match_interval: Interval | None
    n: int
    rows: tuple[Answer, ...]
    preference: PreferenceFigures | None = None
    losses: tuple[tuple[float, int], ...] = ()

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def as_json(self) -> dict[str, Any]:
        """Returns all figures, without the completions."""
        names = ("loss", "perplexity", "exact_match", "n", "loss_interval", "exact_match_interval")
        preference = {} if self.preference is None else self.preference.as_json()
        return {name: getattr(self, name) for name in names} | preference

    def __str__(self) -> str:
        return render_text("evaluation/evaluation.jinja", figures=self, truncate=truncate)


def evaluate_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row],
    max_length: int, *, console: Console | None = None,
) -> Evaluation:  # fmt: skip
    names: dict[int, str] = model.config.id2label  # type: ignore[assignment]
    classes = [names[number] for number in sorted(names)]
    data = encode_labelled(rows, tokenizer, max_length, classes)
    if console and data.report.truncated:
        print_lines(console, data.report)
    pad_id = pad_id_of(model)

    def measured(loss: Classification, some: Sequence[LabelledExample]) -> Sequence[Tensor]:
        arguments = loss.collate(some, loss.device)
        arguments.pop("labels")
        return list(loss.logits(**arguments).cpu())

    loss_of = partial(Classification, model, pad_id)
    with progress_bar(console, "rows") as step:
        logits = torch.stack(measure_rows(model, data.examples, loss_of, measured, step))  # (n, C)
    targets = torch.tensor([e.label for e in data.examples])  # (n,)
    sums = [(value, 1) for value in F.cross_entropy(logits, targets, reduction="none").tolist()]
    likeliest, n = logits.argmax(1), len(rows)
    answers = tuple(
        Answer(row["text"], str(row["label"]), classes[i])
        for row, i in zip(rows, likeliest.tolist(), strict=True)
    )
    hits = int((likeliest == targets).sum())
    return Evaluation(
        mean_loss(sums), loss_interval(sums), hits / n, wilson(hits, n), n, answers,
        losses=tuple(sums),
    )  # fmt: skip


@dataclass(frozen=True)
class EvaluationSettings:
    completions: bool = True
    max_new_tokens: int | None = None
    algorithm: Law = DPO


DEFAULT = EvaluationSettings()


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row],
    max_length: int, settings: EvaluationSettings = DEFAULT, console: Console | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluates a model with its active adapters on held-out rows."""
    rows = to_rows(rows, PAIRS)
    if rows.provides(LABELS):
        return evaluate_classifier(model, tokenizer, rows, max_length, console=console)
    data = encode(rows, tokenizer, max_length)
    if console and (data.report.truncated or data.report.unlabelled):
        print_lines(console, data.report)
    with progress_bar(console, "loss") as step:
        losses = row_losses(model, data.examples, step)
    of_row: dict[int, tuple[float, int]] = {}
    for loss, row, example in zip(losses, data.examples.rows.tolist(), data.examples, strict=True):
        s, n = of_row.get(row, (0.0, 0))
        of_row[row] = s + loss, n + num_targets(example)
    sums, answers, preference = [*of_row.values()], tuple[Answer, ...](), None
    if settings.completions:
        answers = _completions(model, tokenizer, rows, settings.max_new_tokens, console)
    hits = sum(answer.exact for answer in answers)
    if rows.provides(PAIRS):
        pairs = encode_preferences(rows, tokenizer, max_length, PAIRS).examples
        with sharing_prefixes(model, across=True) as support:
            loss_of = Preferences(model, settings.algorithm, support, tokenizer.pad_token_id or 0)
            adapted = bool(selection_of(model).names)
            with progress_bar(console, "preferences") as step:
                preference = preference_figures(loss_of, pairs, adapted, step)
    return Evaluation(
        loss=mean_loss(sums),
        loss_interval=loss_interval(sums),
        exact_match=hits / len(answers) if answers else None,
        exact_match_interval=wilson(hits, len(answers)) if answers else None,
        n=len(rows),
        rows=answers,
        preference=preference,
        losses=tuple(sums),
    )


def _completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_new_tokens: int | None,
    console: Console | None,
) -> tuple[Answer, ...]:
    """Returns the greedy completion of every row; () without references."""
    given = rows.extract(CONVERSATIONS)
    if not given[0].messages:
        return ()
    expected = references(given, tokenizer)
    longest = max(len(tokenizer(r.text, add_special_tokens=False).input_ids) for r in expected)
    prompts, most = [r.prompt for r in expected], max_new_tokens or longest + EXTRA_TOKENS
    with progress_bar(console, "completions") as step:
        texts = complete(model, tokenizer, prompts, most, progress=step)
    return tuple(
        Answer(r.question, r.text, without_reasoning(text, r.prompt, tokenizer))
        for r, text in zip(expected, texts, strict=True)
    )
