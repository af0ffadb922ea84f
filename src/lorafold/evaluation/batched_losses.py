"""Losses of held-out examples, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lorafold.core.contexts import evaluating
from lorafold.data.arrow import lengths_of
from lorafold.data.examples import Example
from lorafold.data.prefix_forest import MAX_SIZE, WINDOW, batches_by_prefix, prefix_forest
from lorafold.errors import LorafoldError
from lorafold.evaluation.intervals import mean_loss
from lorafold.files.terminal import Progress
from lorafold.training_step.fused_modules import fused
from lorafold.training_step.losses import CompletionLoss, Loss, PrefixSharingLoss, similar_lengths
from lorafold.training_step.shared_prefixes import PrefixSupport, sharing_prefixes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

E = TypeVar("E")
F = TypeVar("F")
L = TypeVar("L", bound=PrefixSharingLoss)
MAX_BATCH_TOKENS = 2048  # maximum tokens of a batch, with padding


def held_out_loss(loss: Loss, examples: Sequence[Any]) -> float:
    """Returns the mean loss in nats per labelled token, or per text, in evaluation mode."""
    with evaluating(loss):
        sums = []
        for group in batches(examples):
            batch = [examples[i] for i in group]
            value = loss(**loss.collate(batch, loss.device)).item()
            sums.append((value, sum(map(loss.count, batch))))
        return mean_loss(sums)


def batches(examples: Sequence[Any]) -> list[list[int]]:
    return similar_lengths(range(len(examples)), lengths_of(examples).__getitem__, MAX_BATCH_TOKENS)


def row_losses(model: PreTrainedModel, examples: Sequence[Example], step: Progress) -> list[float]:
    """Returns each example's loss in nats, summed over labelled positions, in evaluation mode."""
    return measure_rows(
        model, examples, lambda support: CompletionLoss(model, support is not None, 0, support),
        lambda loss, batch: loss.by_row(batch).tolist(), step,
    )  # fmt: skip


def measure_rows(
    model: PreTrainedModel,
    examples: Sequence[E],
    loss_of: Callable[[PrefixSupport | None], L],
    measure: Callable[[L, Sequence[E]], Sequence[F]],
    step: Progress,
) -> list[F]:
    """Computes a result for each example in evaluation mode. Shared prefixes are computed once if
    the model supports this and it saves time; otherwise, `loss_of` is called with None.
    """
    results: dict[int, F] = {}

    def run(loss: L, groups: Iterable[Sequence[int]]) -> None:
        with evaluating(loss):
            for group in groups:
                results.update(zip(group, measure(loss, [examples[i] for i in group]), strict=True))
                step(len(results), len(examples))

    with fused(model):
        if groups := list(prefix_batches(examples)):
            with sharing_prefixes(model, across=True) as support:
                loss = loss_of(support)
                run(loss, (g for g in groups if loss.shares_prefixes([examples[i] for i in g])))
        rest = [i for i in range(len(examples)) if i not in results]
        each = batches([examples[i] for i in rest])
        run(loss_of(None), ([rest[i] for i in group] for group in each))
    return [results[i] for i in range(len(examples))]


def prefix_batches(examples: Sequence[Any]) -> Iterator[Sequence[int]]:
    """Yields batches of indices for which shared prefixes save time."""
    for start in range(0, len(examples), WINDOW):
        window = examples[start : start + WINDOW]
        ids = [example.ids for example in window]
        for part in batches_by_prefix(range(len(ids)), 1, MAX_BATCH_TOKENS, ids.__getitem__):
            once = len(prefix_forest([window[i] for i in part]).ids)
            if once <= MAX_SIZE * sum(len(ids[i]) for i in part):
                yield [start + i for i in part]


def pad_id_of(model: PreTrainedModel) -> int:
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None:
        raise LorafoldError(
            "the model's config: field pad_token_id: found null, expected the id of the padding"
            " token"
        )
    return pad_id
