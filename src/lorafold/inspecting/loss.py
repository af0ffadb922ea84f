"""The loss of whatever a model is at the moment, on rows that are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorafold.core.attach import only, selection_of
from lorafold.data.examples import encode
from lorafold.data.rows import Row
from lorafold.evaluation import held_out_loss
from lorafold.step.losses import Completions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def loss_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> Callable[[], float]:
    """Mean loss in nats per labelled token, a call for each time the model has changed.

    LorafoldError for bad rows.
    """
    data = encode(rows, tokenizer, max_length)
    return partial(held_out_loss, Completions(model, packed=False, pad_id=0), data.examples)


def losses_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> dict[str, float]:
    """The losses with the first and with the second of two adapters that a model carries, each
    alone.
    """
    loss = loss_on(model, tokenizer, rows, max_length)
    found = {}
    for word, name in zip(("loss_before", "loss_after"), selection_of(model).names, strict=True):
        with only(model, name):
            found[word] = loss()
    return found
