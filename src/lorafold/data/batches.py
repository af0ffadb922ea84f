"""Which rows a step computes, and how they lie together in tensors: the order of an epoch, held-out
rows, packing plans (best fit decreasing) and collation.

`batches` is a pure function of the seed: step i is found again without any state.
"""

import random
from collections.abc import Sequence
from itertools import chain, count, islice
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.rows import Row
from lorafold.errors import LorafoldError


def batches(n_rows: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Row indices of each optimizer step, (steps, batch): one shuffle per epoch, laid end to end,
    so every step is full.
    """
    if n_rows < 1:
        raise LorafoldError("found no rows to train on, expected at least one")
    epochs = (random.Random(f"{seed}/{epoch}").sample(range(n_rows), n_rows) for epoch in count())
    order = chain.from_iterable(epochs)
    return [list(islice(order, batch)) for _ in range(steps)]


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, evaluation rows), each in the order given; at least one of each unless
    `fraction` is 0.
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


class Tokens(Protocol):
    """One document: ids (T,) and labels (T,), unshifted; -100 where a token is not to be learnt."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def labels(self) -> Sequence[int]: ...


def collate(examples: Sequence[Tokens], packed: bool, pad_id: int) -> dict[str, Tensor]:
    """Packed: input_ids, position_ids, labels (1, T), T the tokens of all.

    Padded at the right: input_ids, attention_mask, labels (B, T).

    labels[b, t] is the target of position t, the token after it, or -100: no document's last
    position has one.
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

    def pad(rows: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    mask = pad([torch.ones_like(i) for i in ids], 0)
    return {"input_ids": pad(ids, pad_id), "attention_mask": mask, "labels": pad(targets, NO_LOSS)}


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents share a row of at most `capacity` tokens: the longest first, each where it
    leaves the least room.

    Indices, ascending in every row. A document that is longer has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [row for row, left in enumerate(room) if left >= lengths[i]]
        if not fitting:
            rows.append([])
            room.append(capacity)
        row = min(fitting, key=room.__getitem__) if fitting else -1
        rows[row].append(i)
        room[row] -= lengths[i]
    return [sorted(row) for row in rows]


def parts(examples: Sequence[Any], n: int, tokens: int | None = None) -> list[Sequence[Any]]:
    """The examples in n runs, and these, packed, in rows of at most so many tokens."""
    size = ceil(len(examples) / n)
    runs = [examples[i : i + size] for i in range(0, len(examples), size)]
    return (
        runs
        if tokens is None
        else [
            [run[i] for i in row]
            for run in runs
            for row in best_fit([len(e.ids) for e in run], tokens)
        ]
    )


def labelled(example: Example) -> int:
    """Tokens of the example that count in the loss; the first token of a row has nothing to be
    predicted from.
    """
    return sum(label != -100 for label in example.labels[1:])
