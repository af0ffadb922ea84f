"""The loss of a model whose adapters change between measurements; the rows are tokenized once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorafold.core.attach import only, selection_of
from lorafold.data.examples import encode
from lorafold.data.sources import Row
from lorafold.evaluation import held_out_loss
from lorafold.step.losses import Completions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def loss_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> Callable[[], float]:
    """A function that measures the model as it is: the mean loss in nats a labelled token.

    Args:
        model, tokenizer: A causal language model, with any adapters.
        rows: Rows of the forms that training takes.
        max_length: Longer examples are cut to this many tokens.

    Raises LorafoldError for bad rows.
    """
    data = encode(rows, tokenizer, max_length)
    return partial(held_out_loss, Completions(model, packed=False, pad_id=0), data.examples)


def losses_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    max_length: int,
    below: int = 0,
) -> dict[str, float]:
    """The losses of two adapters, each active alone: `loss_before` of the one that was attached
    first, `loss_after` of the other, in nats a labelled token.

    Args:
        model, tokenizer: A causal language model with exactly two adapters attached.
        rows: Rows of the forms that training takes.
        max_length: Longer examples are cut to this many tokens.
        below: How many more adapters lie below these two, as part of their base.

    Raises LorafoldError for bad rows.
    """
    loss, names = loss_on(model, tokenizer, rows, max_length), selection_of(model).names
    found = {}
    for key, name in zip(("loss_before", "loss_after"), names[below:], strict=True):
        with only(model, *names[:below], name):
            found[key] = loss()
    return found
