"""Batches: which examples each optimizer step trains on, which rows are held out, which examples
are packed into one sequence (best fit decreasing), and the tensors made of them.

`Batches` depends on nothing but its arguments, so a resumed run computes its batches again and a
checkpoint stores none.
"""

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor, nn

from lorafold.data.arrow import Array
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.shapes import Row
from lorafold.data.stored import Part, Rows
from lorafold.errors import LorafoldError


class Batches(Sequence[list[int]]):
    """The indices of the examples of each optimizer step, (steps, batch).

    The examples are shuffled anew for each epoch and the epochs are joined end to end, so a batch
    may span two epochs and every batch is full. Of a source with weight w an epoch takes the next
    round(w n) of its n examples, in an order of their own that also goes on from epoch to epoch.
    """

    def __init__(self, parts: int | Sequence[Part], batch: int, steps: int, seed: int) -> None:
        """Raises LorafoldError if there are no examples.

        Args:
            parts: The number of examples, or that of each source with its weight.
            batch: Examples of an optimizer step.
            steps: The number of optimizer steps.
        """
        self._parts = [Part(parts)] if isinstance(parts, int) else list(parts)
        self._taken = [epoch_size([part]) for part in self._parts]
        self._batch, self._steps, self._seed = batch, steps, seed
        if not sum(self._taken):
            raise LorafoldError("found no rows to train on, expected at least one")
        self._order = lru_cache(2)(self._epoch)

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < self._steps:
            raise IndexError(index)
        size, start = sum(self._taken), index * self._batch
        return [int(self._order(at // size)[at % size]) for at in range(start, start + self._batch)]

    def _epoch(self, epoch: int) -> Array:
        """The indices of an epoch's examples in the order of training, (size,)."""
        first, pool = 0, []
        for number, (part, taken) in enumerate(zip(self._parts, self._taken, strict=True)):
            pool.append(first + self._next(number, part.size, taken, epoch * taken))
            first += part.size
        found = np.concatenate(pool)
        rng = random.Random(f"{self._seed}/{epoch}")
        return found[rng.sample(range(len(found)), len(found))]

    def _next(self, number: int, size: int, taken: int, start: int) -> Array:
        """The indices, within the source with this number, of the examples that an epoch takes,
        which ascend; before it, epochs took `start`.
        """
        if taken == size:
            return np.arange(size, dtype=np.int32)
        found: list[Array] = []
        while taken:
            turn, at = divmod(start, size)
            rng = random.Random(f"{self._seed}/source {number}/{turn}")
            order = np.array(rng.sample(range(size), size), np.int32)[at : at + taken]
            found.append(order)
            taken, start = taken - len(order), start + len(order)
        return np.sort(np.concatenate(found or [np.zeros(0, np.int32)]))


def epoch_size(parts: Sequence[Part]) -> int:
    """How many examples an epoch has; of a source that has any it takes at least one."""
    return sum(max(1, round(part.weight * part.size)) for part in parts if part.size)


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Return (training rows, held-out rows), chosen at random, each in the order given.

    Either has at least one row, unless `fraction` is 0. Raises LorafoldError if there are fewer
    than two rows to split.

    Args:
        fraction: The share of the rows to hold out, from 0 to 1.
    """
    rows = Rows.of(rows)
    if not fraction:
        return rows, Rows.of([])
    if len(rows) < 2:
        raise LorafoldError(
            f"found {len(rows)} rows, expected at least 2 to hold out a share of {fraction}"
        )
    size = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held = np.zeros(len(rows), bool)
    held[random.Random(f"{seed}/split").sample(range(len(rows)), size)] = True
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


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


def tokens_in(example: Any) -> int:
    """The tokens of an example."""
    return len(example.ids)


def micro_batches(
    examples: Sequence[Any],
    n: int,
    capacity: int | None = None,
    size: Callable[[Any], int] = tokens_in,
) -> list[Sequence[Any]]:
    """Divide the examples of an optimizer step into micro-batches.

    Args:
        examples: The examples of one step, each with `ids`.
        n: The number of micro-batches; packing may make more of them.
        capacity: The tokens that a packed sequence may have; each sequence is then a micro-batch.
            None: the examples are padded.
        size: The tokens that an example takes of a packed sequence.
    """
    share = ceil(len(examples) / n)
    runs = [examples[i : i + share] for i in range(0, len(examples), share)]
    if capacity is None:
        return list(runs)
    return [
        [run[i] for i in sequence]
        for run in runs
        for sequence in best_fit([size(e) for e in run], capacity)
    ]


def labelled(example: Example) -> int:
    """Count the example's tokens that the loss counts. The first token is none of them, because
    nothing comes before it.
    """
    return sum(label != -100 for label in example.labels[1:])
