"""The loss of held-out examples, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from lorafold.core.contexts import evaluating
from lorafold.data.arrow import lengths_of
from lorafold.data.batches import PAYS, WINDOW, alike, forest
from lorafold.data.examples import Example
from lorafold.errors import LorafoldError
from lorafold.evaluation.intervals import mean_loss
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.losses import CompletionLoss, Loss, RowsAlike
from lorafold.training_step.shared_prefixes import Branching, branching

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

E = TypeVar("E")
F = TypeVar("F")
L = TypeVar("L", bound=RowsAlike)
TOKENS = 2048  # the most tokens of a batch, with padding


def held_out_loss(loss: Loss, examples: Sequence[Any]) -> float:
    """The mean loss in nats over the tokens or texts that count, in evaluation mode."""
    with evaluating(loss):
        sums = []
        for group in batches(examples):
            chosen = [examples[i] for i in group]
            value = loss(**loss.collate(chosen, loss.device)).item()
            sums.append((value, sum(map(loss.count, chosen))))
        return mean_loss(sums)


def batches(examples: Sequence[Any]) -> list[list[int]]:
    """Indices of the examples in batches of similar length, which need little padding."""
    groups: list[list[int]] = [[]]
    lengths = lengths_of(examples)
    for i in sorted(range(len(examples)), key=lengths.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[i] > TOKENS:
            groups.append([])
        groups[-1].append(i)
    return groups


def row_losses(
    model: PreTrainedModel, examples: Sequence[Example], step: Callable[[int, int], None]
) -> list[float]:
    """The loss of each example in nats, summed over its labelled positions, in evaluation mode."""

    def loss_of(how: Branching | None) -> CompletionLoss:
        return CompletionLoss(model, how is not None, 0, how)

    return by_row(model, examples, loss_of, lambda loss, some: loss.by_row(some).tolist(), step)


def by_row(
    model: PreTrainedModel,
    examples: Sequence[E],
    loss_of: Callable[[Branching | None], L],
    measure: Callable[[L, Sequence[E]], Sequence[F]],
    step: Callable[[int, int], None],
) -> list[F]:
    """What is measured of each example, in evaluation mode. Those that begin alike are computed
    together, where the model can and it pays.
    """
    found: dict[int, F] = {}

    def measured(loss: L, groups: Iterable[Sequence[int]]) -> None:
        with evaluating(loss):
            for group in groups:
                values = measure(loss, [examples[i] for i in group])
                found.update(zip(group, values, strict=True))
                step(len(found), len(examples))

    with fused(model):
        if groups := list(alike_in(examples)):
            with branching(model, across=True) as how:
                loss = loss_of(how)
                measured(loss, (g for g in groups if loss.shared_in([examples[i] for i in g])))
        rest = [i for i in range(len(examples)) if i not in found]
        apart = batches([examples[i] for i in rest]) if rest else []
        measured(loss_of(None), ([rest[i] for i in group] for group in apart))
    return [found[i] for i in range(len(examples))]


def alike_in(examples: Sequence[Any]) -> Iterator[Sequence[int]]:
    """Indices of examples in batches of those that begin alike, where that pays."""
    for first in range(0, len(examples), WINDOW):
        window = examples[first : first + WINDOW]
        ids = [example.ids for example in window]
        lengths = [len(of) for of in ids]
        for part in alike(range(len(ids)), 1, TOKENS, ids.__getitem__):
            once = len(forest([window[i] for i in part]).ids)
            if once <= PAYS * sum(lengths[i] for i in part):
                yield [first + i for i in part]


def padding_of(model: PreTrainedModel) -> int:
    """The token that pads short texts."""
    pad_id: int | None = model.config.get_text_config().pad_token_id
    if pad_id is None:
        raise LorafoldError(
            "the model's config: field pad_token_id: found null, expected the id of the token that"
            " pads short texts"
        )
    return pad_id


@contextmanager
def progress_bar(console: Console | None, name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; it yields a function of how many are done, of how many."""
    from rich.progress import Progress

    quiet = console is None or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task(name)
        yield lambda done, total: bars.update(task, completed=done, total=total)
