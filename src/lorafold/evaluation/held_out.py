"""The loss of held-out examples, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorafold.core.evaluating import evaluating
from lorafold.data.arrow import lengths_of
from lorafold.evaluation.intervals import mean_loss
from lorafold.step.losses import Loss

if TYPE_CHECKING:
    from rich.console import Console

TOKENS = 2048  # the most tokens of a batch, with padding


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


@contextmanager
def progress_bar(console: Console | None, name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar; it yields a function of how many are done, of how many."""
    from rich.progress import Progress

    quiet = console is None or not console.is_terminal
    with Progress(console=console, transient=True, disable=quiet) as bars:
        task = bars.add_task(name)
        yield lambda done, total: bars.update(task, completed=done, total=total)
