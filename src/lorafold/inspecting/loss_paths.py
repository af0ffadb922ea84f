"""The loss along straight lines in weight space.

    base + t dW                     t from -0.5 to 1.5: whether a smaller or larger update is better
    base + (1 - t) dW_a + t dW_b    t from 0 to 1: whether a barrier separates two adapters
    barrier                         max over t of L(t) - ((1 - t) L(0) + t L(1)), in nats

The update is scaled, not its factors, so the line is straight for every method that can be merged.
Linear mode connectivity: Frankle et al. 2020, arXiv 1912.05671; barrier: Entezari et al. 2022,
arXiv 2110.06296.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorafold.core.attach import adapted_modules, attach_delta, detach_delta, only, selection_of
from lorafold.core.combine import Mix, Stack
from lorafold.core.delta import Delta
from lorafold.data.examples import encode
from lorafold.data.json_input import Row
from lorafold.errors import LorafoldError
from lorafold.evaluation import held_out_loss
from lorafold.inspecting.result import LossPaths, LossPoint
from lorafold.layers import layer_class
from lorafold.methods.common.trainable_tokens import TokenRows
from lorafold.training_step.losses import CompletionLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def loss_function(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> Callable[[], float]:
    data = encode(rows, tokenizer, max_length)
    return partial(held_out_loss, CompletionLoss(model, packed=False, pad_id=0), data.examples)


def compare_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    below: int = 0,
) -> dict[str, float]:
    """The loss with the first adapter (`loss_before`) and with the second (`loss_after`), each on
    top of the `below` lowest adapters.
    """
    loss, names = loss_function(model, tokenizer, rows, max_length), selection_of(model).names
    losses = {}
    for key, name in zip(("loss_before", "loss_after"), names[below:], strict=True):
        with only(model, *names[:below], name):
            losses[key] = loss()
    return losses


SCALES = tuple(i / 4 for i in range(-2, 7))
WEIGHTS = tuple(i / 10 for i in range(11))
LINE = "line"  # the name under which the weighted sum of adapters is attached


@contextmanager
def weighted_sum(
    model: nn.Module, names: Sequence[str], loss: Callable[[], float], below: Sequence[str] = ()
) -> Iterator[Callable[[Sequence[float]], float]]:
    """Activates a weighted sum of adapters on top of the adapters `below`, and yields the loss as a
    function of the weights. Embedding rows of new tokens are not scaled.
    """
    selection, mixes = selection_of(model), []
    for _, module in list(adapted_modules(model)):
        by_adapter = {
            i: _without_new_tokens(module, name)
            for i, name in enumerate(names)
            if name in module.deltas
        }
        if not by_adapter:
            continue
        rows = [row for _, new in by_adapter.values() for row in new]
        if len(rows) > 1:
            raise LorafoldError(
                "the loss between two adapters: both have new tokens, expected them in at most one"
            )
        changes = {i: delta for i, (delta, _) in by_adapter.items() if delta is not None}
        keys = list(changes)
        mix = Mix(
            list(changes.values()), torch.ones(len(keys), device=next(module.parameters()).device)
        )
        line = Stack([*([mix] if keys else []), *rows]) if rows else mix
        attach_delta(module, layer_class(module), LINE, line, selection)
        mixes.append((module, mix, keys))

    def loss_at(weights: Sequence[float]) -> float:
        with torch.no_grad():
            for _, mix, keys in mixes:
                mix.gates.copy_(torch.tensor([weights[i] for i in keys]))
        return loss()

    try:
        with only(model, *below, LINE):
            yield loss_at
    finally:
        for module, _, _ in mixes:
            detach_delta(module, LINE)


def _without_new_tokens(module: Any, name: str) -> tuple[Delta | None, list[TokenRows]]:
    """The adapter's delta without embedding rows of new tokens, and these rows."""
    delta, weight = module.deltas[name], module._parameters.get("weight")
    parts = list(delta.parts())
    rows = [part for part in parts if isinstance(part, TokenRows)]
    new = [part for part in rows if max(part.ids) >= len(weight)]
    if not new:
        return delta, []
    others = [part for part in parts if part not in new]
    return Stack(others) if others else None, new


def loss_by_scale(
    model: nn.Module,
    name: str,
    loss: Callable[[], float],
    points: Sequence[float] = SCALES,
    below: Sequence[str] = (),
) -> list[LossPoint]:
    with weighted_sum(model, [name], loss, below) as loss_at:
        return [(t, loss_at([t])) for t in points]


def loss_between(
    model: nn.Module,
    first: str,
    second: str,
    loss: Callable[[], float],
    points: Sequence[float] = WEIGHTS,
) -> list[LossPoint]:
    with weighted_sum(model, [first, second], loss) as loss_at:
        return [(t, loss_at([1 - t, t])) for t in points]


def barrier(points: Sequence[LossPoint]) -> float:
    """The largest excess over the straight line between both ends, in nats; points ascend in t."""
    start, end = points[0][1], points[-1][1]
    return max(loss - ((1 - t) * start + t * end) for t, loss in points)


def measure_paths(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    below: int = 0,
) -> LossPaths:
    loss, names = loss_function(model, tokenizer, rows, max_length), selection_of(model).names
    first, *others = names[below:]
    scale_losses = loss_by_scale(model, first, loss, below=names[:below])
    if not others:
        return LossPaths(len(rows), scale_losses)
    between_losses = loss_between(model, first, others[0], loss)
    return LossPaths(len(rows), scale_losses, between_losses, barrier(between_losses))
