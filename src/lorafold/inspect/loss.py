"""The loss of whatever a model is at the moment, on rows that are encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorafold.evaluate import held_out_loss
from lorafold.train.data import encode
from lorafold.train.losses import Completions
from lorafold.train.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def loss_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int) -> Callable[[], float]:
    """Mean loss in nats per labelled token, a call for each time the model has changed. LorafoldError for bad rows."""
    data = encode(rows, tokenizer, max_length)
    return partial(held_out_loss, Completions(model, packed=False, pad_id=0), data.examples)
