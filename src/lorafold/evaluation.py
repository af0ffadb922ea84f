"""How good a model is on held-out rows: loss, perplexity and exact match, each with a 95% interval.

    loss = sum_i s_i / sum_i n_i          s_i is the summed loss of row i in nats, over its n_i
                                          labelled tokens; perplexity = exp(loss)
    var(loss) = m / (m - 1) sum_i (s_i - loss n_i)^2 / (sum_i n_i)^2

The tokens of a row are not independent, so the interval of the loss is that of a ratio estimate
with rows as its units (Cochran, Sampling Techniques, 1977, ch. 6). Exact match is the share of
greedy completions that equal the reference, surrounding whitespace aside, and for a classifier its
accuracy. Its interval is Wilson's (1927), which is valid at 0% and 100% too. Training measures the
loss alone, with `held_out_loss`.
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
from lorafold.data.arrow import lengths_of
from lorafold.data.checking import is_labelled
from lorafold.data.examples import encode
from lorafold.data.labelled import encode_labelled
from lorafold.data.references import references, without_reasoning
from lorafold.data.shapes import Row, shape_of
from lorafold.errors import LorafoldError
from lorafold.generation import complete
from lorafold.step.losses import Classification, Completions, Loss

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
TOKENS = 2048  # the most tokens of a batch, with padding
SPARE = 8  # tokens beyond the longest reference, so that a completion that goes on is seen as such


@dataclass(frozen=True)
class Answer:
    """One row: its last message before the completion (or its text), the reference, and the model's
    completion (or class) in `answer`.
    """

    prompt: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        """Whether the completion equals the reference, surrounding whitespace aside."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Evaluation:
    """The loss in nats a labelled token (or a classified text), and exact match as a share of the n
    rows. Exact match is None for rows without references, the loss interval for a single row.
    """

    loss: float
    loss_interval: Interval | None
    exact_match: float | None
    exact_match_interval: Interval | None
    n: int
    rows: tuple[Answer, ...]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    def as_json(self) -> dict[str, Any]:
        """All figures, without the completions."""
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
    """Measure a model with the adapters that are active on it.

    Args:
        model: A causal language model or, for rows of text and label, a sequence classifier whose
            config names the classes (`id2label`).
        tokenizer: The model's.
        rows: Rows of one form. Plain text has no exact match.
        max_length: Longer examples are cut to this many tokens for the loss.
        generate: Generate completions for the exact match.
        max_new_tokens: The most tokens of a completion; None takes the longest reference.
        console: For progress and a report of what was cut; None is quiet.

    Raises LorafoldError for bad rows and for a loss that is not finite.
    """
    if is_labelled(rows):
        return evaluate_classifier(model, tokenizer, rows, max_length, console=console)
    data = encode(rows, tokenizer, max_length)
    if console and (data.report.truncated or data.report.unlabelled):
        console.print(str(data.report), highlight=False)
    loss = Completions(model, packed=False, pad_id=0)
    losses: dict[int, float] = {}  # by example
    with _bar(console, "loss") as step, evaluating(loss):
        for group in batches(data.examples):
            found = loss.by_row(**loss.collate([data.examples[i] for i in group], loss.device))
            losses |= dict(zip(group, found.tolist(), strict=True))
            step(len(losses), len(data.examples))
    by_row: dict[int, tuple[float, int]] = {}
    for i, row in enumerate(data.examples.rows.tolist()):
        s, n = by_row.get(row, (0.0, 0))
        by_row[row] = s + losses[i], n + loss.count(data.examples[i])
    sums = list(by_row.values())
    answers = _completions(model, tokenizer, rows, max_new_tokens, console) if generate else ()
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

    Args:
        model: A sequence classifier whose config names the classes (`id2label`).
        tokenizer: The model's.
        rows: Rows of text and label.
        max_length: Longer texts are cut to this many tokens.
        console: For progress and a report of what was cut; None is quiet.

    Raises LorafoldError for a label that is not one of the model's classes, and for a model whose
    config has no padding token.
    """
    names: dict[int, str] = model.config.id2label  # type: ignore[assignment]
    classes = [names[number] for number in sorted(names)]
    data = encode_labelled(rows, tokenizer, max_length, classes)
    if console and data.report.truncated:
        console.print(str(data.report), highlight=False)
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None:
        raise LorafoldError(
            "the model's config: field pad_token_id: found null, expected the id of the token that"
            " pads short texts"
        )
    loss = Classification(model, pad_id)
    by_row: dict[int, Tensor] = {}
    with _bar(console, "rows") as step, evaluating(loss):
        for group in batches(data.examples):
            arguments = loss.collate([data.examples[i] for i in group], loss.device)
            arguments.pop("labels")
            by_row |= dict(zip(group, loss.logits(**arguments).cpu(), strict=True))
            step(len(by_row), len(rows))
    logits = torch.stack([by_row[i] for i in range(len(rows))])  # (n, C)
    targets = torch.tensor([e.label for e in data.examples])  # (n,)
    sums = [(value, 1) for value in F.cross_entropy(logits, targets, reduction="none").tolist()]
    chosen = [classes[i] for i in logits.argmax(1).tolist()]
    answers = tuple(
        Answer(row["text"], str(row["label"]), name) for row, name in zip(rows, chosen, strict=True)
    )
    hits = int((logits.argmax(1) == targets).sum())
    n = len(rows)
    return Evaluation(_mean(sums), loss_interval(sums), hits / n, wilson(hits, n), n, answers)


def held_out_loss(loss: Loss, examples: Sequence[Any]) -> float:
    """The mean loss in nats over the tokens or texts that count, in evaluation mode.

    Raises LorafoldError if it is not finite.
    """
    with evaluating(loss):
        sums = []
        for group in batches(examples):
            chosen = [examples[i] for i in group]
            value = loss(**loss.collate(chosen, loss.device)).item()
            sums.append((value, sum(map(loss.count, chosen))))
        return _mean(sums)


def wilson(hits: int, n: int) -> Interval:
    """Wilson's 95% interval of the share hits / n (Wilson 1927)."""
    share, shrink = hits / n, 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def loss_interval(sums: Sequence[tuple[float, int]]) -> Interval | None:
    """The 95% interval of the mean loss, from (summed loss, tokens) of each row (Cochran 1977, ch.
    6); None for a single row.
    """
    m, tokens = len(sums), sum(n for _, n in sums)
    if m < 2:
        return None
    mean = _mean(sums)
    half = Z * math.sqrt(m / (m - 1) * sum((s - mean * n) ** 2 for s, n in sums)) / tokens
    return max(0.0, mean - half), mean + half


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    """The mean loss over tokens. Raises LorafoldError if it is not finite."""
    loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
    if not math.isfinite(loss):
        raise LorafoldError(
            f"held-out loss: found {loss}, expected a finite number; check the weights of the model"
            " and its adapters"
        )
    return loss


def batches(examples: Sequence[Any]) -> list[list[int]]:
    """Indices of the examples in batches of similar length, which need little padding."""
    groups: list[list[int]] = [[]]
    lengths = lengths_of(examples)
    for i in sorted(range(len(examples)), key=lengths.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[i] > TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups


def _completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_new_tokens: int | None,
    console: Console | None,
) -> tuple[Answer, ...]:
    """The greedy completion of every row; none for rows without references."""
    if (shape := shape_of(rows[0])) is None or shape.conversation is None:
        return ()
    found = references(rows, tokenizer)
    longest = max(len(tokenizer(r.text, add_special_tokens=False).input_ids) for r in found)
    with _bar(console, "completions") as step:
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


@contextmanager
def _bar(console: Console | None, name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; it yields a function of how many are done, of how many."""
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=console is None) as bars:
        task = bars.add_task(name)
        yield lambda done, total: bars.update(task, completed=done, total=total)
