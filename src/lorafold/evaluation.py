"""How good a model is on held-out rows: loss, perplexity and exact match, each with a 95% interval.

    loss = sum_i s_i / sum_i n_i          s_i the summed loss of row i in nats over its n_i labelled
                                          tokens; perplexity = exp(loss)
    var(loss) = m / (m - 1) sum_i (s_i - loss n_i)^2 / (sum_i n_i)^2

Tokens of a row hang together, so the row is the unit of the interval (a ratio estimate: Cochran,
Sampling Techniques, 1977, ch. 6). Exact match is the share of greedy answers that equal the
reference, less surrounding whitespace, and for a classifier its accuracy; its interval is Wilson's
(1927), which holds at 0% and 100% too. `held_out_loss` is the figure alone, for use during
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.core.evaluating import evaluating
from lorafold.data.examples import encode
from lorafold.data.labelled import encode_labelled
from lorafold.data.render import prompts
from lorafold.data.rows import Row, is_labelled, shape_of
from lorafold.errors import LorafoldError
from lorafold.generation import complete
from lorafold.step.losses import Classification, Completions, Loss

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
TOKENS = 2048  # of a held-out batch, padding included
SPARE = 8  # tokens beyond the longest reference, to tell an answer that goes on from one that ends


@dataclass(frozen=True)
class Answer:
    """One row answered: the last message before the answer, the reference and what the model
    said.
    """

    prompt: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per labelled token or classified text, exact match as a share of the n rows.

    None without references, and for the interval of one row."""

    loss: float
    loss_interval: Interval | None
    exact_match: float | None
    exact_match_interval: Interval | None
    n: int
    rows: tuple[Answer, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    def as_json(self) -> dict[str, Any]:
        """All figures; the answers themselves are left out."""
        names = ("loss", "perplexity", "exact_match", "n", "loss_interval", "exact_match_interval")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        def within(interval: Interval | None, form: str) -> str:
            return f" (95%: {interval[0]:{form}} to {interval[1]:{form}})" if interval else ""

        text = (
            f"{self.n} rows: loss {self.loss:.4f}{within(self.loss_interval, '.4f')}, perplexity"
            f" {self.perplexity:.3f}"
        )
        if self.exact_match is not None:
            text += (
                f", exact match {self.exact_match:.1%}{within(self.exact_match_interval, '.1%')}"
            )
        return text


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    *,
    generate: bool = True,
    max_new_tokens: int | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure the model, with whatever adapters are live, on rows of one shape; rows longer than
    max_length tokens are cut for the loss.

    On rows of text and label the model is a sequence classifier whose config names the classes
    (`id2label`). Rows of plain text, and `generate=False`, have no exact match. Answers may be as
    long as the longest reference unless max_new_tokens says otherwise. Progress and what was cut go
    to the console. LorafoldError for bad rows and a loss that is not finite.
    """
    if is_labelled(rows):
        return evaluate_classifier(model, tokenizer, rows, max_length, console=console)
    data = encode(rows, tokenizer, max_length)
    if console and (data.report.truncated or data.report.unlabelled):
        console.print(str(data.report), highlight=False)
    loss = Completions(model, packed=False, pad_id=0)
    by_row: dict[int, float] = {}
    with _bar(console, "loss") as step, evaluating(loss):
        for group in _batches(data.examples):
            found = loss.by_row(**loss.collate([data.examples[i] for i in group], loss.device))
            by_row |= dict(zip(group, found.tolist(), strict=True))
            step(len(by_row), len(rows))
    sums = [(by_row[i], loss.count(example)) for i, example in enumerate(data.examples)]
    answers = _answers(model, tokenizer, rows, max_new_tokens, console) if generate else ()
    hits = sum(answer.exact for answer in answers)
    return Evaluation(
        loss=_mean(sums),
        loss_interval=loss_interval(sums),
        exact_match=hits / len(answers) if answers else None,
        exact_match_interval=wilson(hits, len(answers)) if answers else None,
        n=len(rows),
        rows=answers,
    )


def evaluate_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    *,
    console: Console | None = None,
) -> Evaluation:
    """`evaluate` for rows of text and label.

    LorafoldError for a label that is none of the model's classes, and a model whose config names no
    padding token.
    """
    names: dict[int, str] = model.config.id2label  # type: ignore[assignment]
    classes = [names[number] for number in sorted(names)]
    data = encode_labelled(rows, tokenizer, max_length, classes)
    if console and data.report.truncated:
        console.print(str(data.report), highlight=False)
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None:
        raise LorafoldError(
            "the model's config: field pad_token_id: found null, expected the token that fills"
            " short texts up"
        )
    loss = Classification(model, pad_id)
    by_row: dict[int, Tensor] = {}
    with _bar(console, "rows") as step, evaluating(loss):
        for group in _batches(data.examples):
            arguments = loss.collate([data.examples[i] for i in group], loss.device)
            arguments.pop("labels")
            by_row |= dict(zip(group, loss.logits(**arguments).cpu(), strict=True))
            step(len(by_row), len(rows))
    # (n, C), (n,)
    logits, targets = (
        torch.stack([by_row[i] for i in range(len(rows))]),
        torch.tensor([e.label for e in data.examples]),
    )
    sums = [(value, 1) for value in F.cross_entropy(logits, targets, reduction="none").tolist()]
    chosen = [classes[i] for i in logits.argmax(1).tolist()]
    answers = tuple(
        Answer(row["text"], str(row["label"]), name) for row, name in zip(rows, chosen, strict=True)
    )
    hits = int((logits.argmax(1) == targets).sum())
    return Evaluation(
        _mean(sums),
        loss_interval(sums),
        hits / len(rows),
        wilson(hits, len(rows)),
        len(rows),
        answers,
    )


def held_out_loss(loss: Loss, examples: Sequence[Any]) -> float:
    """Mean loss in nats; its model is left in the mode it was in.

    LorafoldError if it is not finite.
    """
    with evaluating(loss):
        groups = [[examples[i] for i in group] for group in _batches(examples)]
        return _mean(
            [
                (loss(**loss.collate(group, loss.device)).item(), sum(map(loss.count, group)))
                for group in groups
            ]
        )


def wilson(hits: int, n: int) -> Interval:
    """Wilson's 95% interval of a share."""
    share, shrink = hits / n, 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def loss_interval(sums: Sequence[tuple[float, int]]) -> Interval | None:
    """The 95% interval of the mean loss from (summed loss, tokens) a row; None for a single row."""
    m, tokens = len(sums), sum(n for _, n in sums)
    if m < 2:
        return None
    mean = _mean(sums)
    half = Z * math.sqrt(m / (m - 1) * sum((s - mean * n) ** 2 for s, n in sums)) / tokens
    return max(0.0, mean - half), mean + half


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
    if not math.isfinite(loss):
        raise LorafoldError(
            f"held-out loss: found {loss}, expected a finite number: the model or an adapter holds"
            " broken weights"
        )
    return loss


def _batches(examples: Sequence[Any]) -> list[list[int]]:
    """Places of the examples, those of like length together, so that little is padding."""
    groups: list[list[int]] = [[]]
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i].ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(examples[i].ids) > TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_new_tokens: int | None,
    console: Console | None,
) -> tuple[Answer, ...]:
    conversations = [
        shape.conversation(row).messages
        for row in rows
        if (shape := shape_of(row)) and shape.conversation
    ]
    if not conversations:
        return ()
    pairs = prompts(rows, tokenizer)
    longest = max(
        len(tokenizer(reference, add_special_tokens=False).input_ids) for _, reference in pairs
    )
    with _bar(console, "answers") as step:
        texts = complete(
            model,
            tokenizer,
            [prompt for prompt, _ in pairs],
            max_new_tokens or longest + SPARE,
            progress=step,
        )
    asked = (
        messages[max(i for i, m in enumerate(messages) if m["role"] == "assistant") - 1]["content"]
        for messages in conversations
    )
    return tuple(
        Answer(*parts)
        for parts in zip(asked, (reference for _, reference in pairs), texts, strict=True)
    )


@contextmanager
def _bar(console: Console | None, name: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=console is None) as bars:
        task = bars.add_task(name)
        yield lambda done, total: bars.update(task, completed=done, total=total)
