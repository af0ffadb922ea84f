"""Batches: which rows each optimizer step trains on, which rows are held out, which examples are
packed into one sequence (best fit decreasing), and the tensors made of them.

`batches` depends on nothing but its arguments, so a resumed run computes its batches again and a
checkpoint stores none.
"""

import random
from collections.abc import Sequence
from itertools import chain, count, islice
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.sources import Row
from lorafold.errors import LorafoldError


def batches(n_rows: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Return the row indices of each optimizer step, as (steps, batch).

    The rows are shuffled anew for each epoch and the epochs are joined end to end, so a batch may
    span two epochs and every batch is full. Raises LorafoldError if there are no rows.

    Args:
        n_rows: The number of training rows.
        batch: Rows of an optimizer step.
        steps: The number of optimizer steps.
        seed: The seed of the shuffles.
    """
    if n_rows < 1:
        raise LorafoldError("found no rows to train on, expected at least one")
    epochs = (random.Random(f"{seed}/{epoch}").sample(range(n_rows), n_rows) for epoch in count())
    order = chain.from_iterable(epochs)
    return [list(islice(order, batch)) for _ in range(steps)]


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows), chosen at random, each in the order given.

    Either has at least one row, unless `fraction` is 0. Raises LorafoldError if there are fewer
    than two rows to split.

    Args:
        rows: The user's rows.
        fraction: The share of the rows to hold out, from 0 to 1.
        seed: The seed of the choice.
    """
    if not fraction:
        return list(rows), []
    if len(rows) < 2:
        raise LorafoldError(
            f"found {len(rows)} rows, expected at least 2 to hold out a share of {fraction}"
        )
    size = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held = set(random.Random(f"{seed}/split").sample(range(len(rows)), size))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


class WithLabels(Protocol):
    """Anything with token ids (T,) and unshifted labels (T,), such as an `Example`."""

    @property
    def ids(self) -> Sequence[int]:
        """The token ids, (T,)."""

    @property
    def labels(self) -> Sequence[int]:
        """The label of each token, (T,): its id, or -100 if the loss leaves it out."""


def collate(examples: Sequence[WithLabels], packed: bool, pad_id: int) -> dict[str, Tensor]:
    """Return the tensors of one forward pass over the examples.

    Packed: input_ids, position_ids and labels, (1, T), where T is the sum of the lengths.
    Padded at the right: input_ids, attention_mask and labels, (B, T), where T is the longest.

    The labels returned are shifted: labels[b, t] is the token after position t, or -100 if the loss
    leaves it out, as it does at the last position of each example.

    Args:
        examples: The tokenized rows, with unshifted labels.
        packed: Pack the examples into one sequence instead of padding them.
        pad_id: The token id that fills short sequences; the attention mask hides it.
    """
    ids = [torch.tensor(e.ids, dtype=torch.long) for e in examples]
    targets = [torch.tensor([*e.labels[1:], NO_LOSS], dtype=torch.long) for e in examples]
    if packed:
        positions = torch.cat([torch.arange(len(i)) for i in ids])
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": positions[None],
            "labels": torch.cat(targets)[None],
        }

    def pad(sequences: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)

    mask = pad([torch.ones_like(i) for i in ids], 0)
    return {"input_ids": pad(ids, pad_id), "attention_mask": mask, "labels": pad(targets, NO_LOSS)}


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Plan which documents are packed into one sequence of at most `capacity` tokens.

    Best fit decreasing: the longest document is placed first, and each goes into the sequence
    where it leaves the least room. A document longer than `capacity` has a sequence of its own.
    Returns the indices of the documents of each sequence, ascending.
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [n for n, left in enumerate(room) if left >= lengths[i]]
        if not fitting:
            sequences.append([])
            room.append(capacity)
        chosen = min(fitting, key=room.__getitem__) if fitting else -1
        sequences[chosen].append(i)
        room[chosen] -= lengths[i]
    return [sorted(indices) for indices in sequences]


def micro_batches(
    examples: Sequence[Any], n: int, capacity: int | None = None
) -> list[Sequence[Any]]:
    """Divide the examples of an optimizer step into micro-batches.

    Args:
        examples: The examples of one step, each with `ids`.
        n: The number of micro-batches; packing may make more of them.
        capacity: The tokens that a packed sequence may have; each sequence is then a micro-batch.
            None: the examples are padded.
    """
    size = ceil(len(examples) / n)
    runs = [examples[i : i + size] for i in range(0, len(examples), size)]
    if capacity is None:
        return list(runs)
    return [
        [run[i] for i in sequence]
        for run in runs
        for sequence in best_fit([len(e.ids) for e in run], capacity)
    ]


def labelled(example: Example) -> int:
    """Count the example's tokens that the loss counts. The first token is none of them, because
    nothing comes before it.
    """
    return sum(label != -100 for label in example.labels[1:])
