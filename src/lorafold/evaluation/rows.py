"""How good a model is on held-out rows: loss, perplexity and exact match, each with a 95% interval.

    loss = sum_i s_i / sum_i n_i          s_i is the summed loss of row i in nats, over its n_i
                                          labelled tokens; perplexity = exp(loss)

Exact match is the share of greedy completions that equal the reference, surrounding whitespace
aside, and for a classifier its accuracy. Training measures the loss alone, with `held_out_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafold.core.attach import selection_of
from lorafold.data.batches import labelled
from lorafold.data.branches import encode_preferred
from lorafold.data.examples import encode
from lorafold.data.prompts import references, without_reasoning
from lorafold.data.rows import as_checked
from lorafold.data.shapes import CONVERSATIONS, LABELS, PAIRS
from lorafold.data.sources import Row
from lorafold.data.stored import Rows
from lorafold.evaluation.classifier import evaluate_classifier
from lorafold.evaluation.held_out import progress_bar, row_losses
from lorafold.evaluation.intervals import loss_interval, mean_loss, wilson
from lorafold.evaluation.preferences import PreferenceFigures, preference_figures
from lorafold.evaluation.result import Answer, Evaluation
from lorafold.generation import complete
from lorafold.step.branches import branching
from lorafold.step.preference_laws import Dpo, Law
from lorafold.step.preferences import Preferences

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DPO = Dpo()
SPARE = 8  # tokens beyond the longest reference, so that a completion that goes on is seen as such


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured beside the loss.

    Args:
        completions: Generate completions for the exact match.
        max_new_tokens: The most tokens of a completion; None takes the longest reference.
        law: What rewards are, on rows of preferences.
    """

    completions: bool = True
    max_new_tokens: int | None = None
    law: Law = DPO


DEFAULT = EvaluationSettings()


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    settings: EvaluationSettings = DEFAULT,
    console: Console | None = None,
) -> Evaluation:
    """Measure a model with the adapters that are active on it.

    Args:
        model: A causal language model or, for rows of text and label, a sequence classifier whose
            config names the classes (`id2label`).
        rows: Rows of one form. Plain text has no exact match.
        max_length: Longer examples are cut to this many tokens for the loss.
        settings: What is measured beside the loss.
        console: For progress and a report of what was cut; None is quiet.

    Raises LorafoldError for bad rows and for a loss that is not finite.
    """
    rows = as_checked(rows, PAIRS)
    if rows.give(LABELS):
        return evaluate_classifier(model, tokenizer, rows, max_length, console=console)
    data = encode(rows, tokenizer, max_length)
    if console and (data.report.truncated or data.report.unlabelled):
        console.print(str(data.report), highlight=False)
    with progress_bar(console, "loss") as step:
        losses = row_losses(model, data.examples, step)
    by_row: dict[int, tuple[float, int]] = {}
    for i, row in enumerate(data.examples.rows.tolist()):
        s, n = by_row.get(row, (0.0, 0))
        by_row[row] = s + losses[i], n + labelled(data.examples[i])
    sums = list(by_row.values())
    answers: tuple[Answer, ...] = ()
    if settings.completions:
        answers = _completions(model, tokenizer, rows, settings.max_new_tokens, console)
    hits = sum(answer.exact for answer in answers)
    return Evaluation(
        loss=mean_loss(sums),
        loss_interval=loss_interval(sums),
        exact_match=hits / len(answers) if answers else None,
        exact_match_interval=wilson(hits, len(answers)) if answers else None,
        n=len(rows),
        rows=answers,
        preference=_preference(model, tokenizer, rows, max_length, settings.law, console),
        losses=tuple(sums),
    )


def _preference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_length: int,
    law: Law,
    console: Console | None,
) -> PreferenceFigures | None:
    """The figures of pairs, against the model without its highest adapter; None for other rows."""
    if not rows.give(PAIRS):
        return None
    data = encode_preferred(rows, tokenizer, max_length, PAIRS)
    with branching(model, across=True) as how, progress_bar(console, "preferences") as step:
        loss = Preferences(model, law, how, tokenizer.pad_token_id or 0)
        adapted = bool(selection_of(model).names)
        return preference_figures(loss, data.examples, adapted, step)


def _completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_new_tokens: int | None,
    console: Console | None,
) -> tuple[Answer, ...]:
    """The greedy completion of every row; none for rows without references."""
    given = rows.given(CONVERSATIONS)
    if not given[0].messages:
        return ()
    found = references(given, tokenizer)
    longest = max(len(tokenizer(r.text, add_special_tokens=False).input_ids) for r in found)
    with progress_bar(console, "completions") as step:
        texts = complete(
            model,
            tokenizer,
            [reference.prompt for reference in found],
            max_new_tokens or longest + SPARE,
            progress=step,
        )
    return tuple(
        Answer(r.asked, r.text, without_reasoning(text, r.prompt, tokenizer))
        for r, text in zip(found, texts, strict=True)
    )
