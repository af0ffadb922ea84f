"""Batches: shuffling, held-out split, packing and collation.

A feed's batches depend only on its arguments, so a resumed run computes the same batches.
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorafold.data.arrow import Array
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.formats import CONVERSATIONS, Message, Row
from lorafold.data.row_store import Rows, SourcePart
from lorafold.errors import LorafoldError

SINGLE = ["system", "user", "assistant"]  # the roles of a conversation with one question
MAX_JOINED = 3


class Batches(Sequence[list[int]]):
    """The indices of each step's rows among the rows with examples, (steps, batch).

    Shuffled epochs are concatenated, so every batch is full and may span two epochs. From a source
    with weight w and n rows, each epoch takes the next round(w n) rows, or at least one, of an
    order that continues across epochs.
    """

    def __init__(
        self, parts: int | Sequence[SourcePart], batch: int, steps: int, seed: int
    ) -> None:
        self._parts = [SourcePart(parts)] if isinstance(parts, int) else list(parts)
        self._epoch_sizes = [epoch_size([part]) for part in self._parts]
        self._batch, self._steps, self._seed = batch, steps, seed
        if not sum(self._epoch_sizes):
            raise LorafoldError("data: no rows to train on, expected at least one")
        self._order = lru_cache(2)(self._epoch)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        if not 0 <= index < self._steps:
            raise IndexError(index)
        size, start = sum(self._epoch_sizes), index * self._batch
        return [int(self._order(at // size)[at % size]) for at in range(start, start + self._batch)]

    def _epoch(self, epoch: int) -> Array:
        first, pool = 0, []
        for number, (part, share) in enumerate(zip(self._parts, self._epoch_sizes, strict=True)):
            own = np.arange(part.size, dtype=np.int32)
            if share != part.size:
                # takes the next examples; an exhausted source is shuffled again
                shuffle, at = divmod(epoch * share, part.size)
                sampled: list[int] = []
                while len(sampled) < at + share:
                    rng = random.Random(f"{self._seed}/source {number}/{shuffle}")
                    sampled += rng.sample(range(part.size), part.size)
                    shuffle += 1
                own = np.sort(np.array(sampled[at : at + share], np.int32))
            pool.append(first + own)
            first += part.size
        indices = np.concatenate(pool)
        rng = random.Random(f"{self._seed}/{epoch}")
        return indices[rng.sample(range(len(indices)), len(indices))]


def epoch_size(parts: Sequence[SourcePart]) -> int:
    return sum(max(1, round(part.weight * part.size)) for part in parts if part.size)


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[Rows, Rows]:
    rows = Rows.of(rows)
    if not fraction:
        return rows, Rows.of([])
    if len(rows) < 2:
        raise LorafoldError(
            f"data: found {len(rows)} rows, expected at least 2 to hold out {fraction} of them"
        )
    size = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    held = np.zeros(len(rows), bool)
    held[random.Random(f"{seed}/split").sample(range(len(rows)), size)] = True
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def join_questions(rows: Rows, seed: int, max_length: int) -> tuple[Rows, str]:
    """Joins conversations with one question, of the same source, system message and tools, into
    conversations of 1 to MAX_JOINED questions, in an order that depends on the seed. A conversation
    has at most `max_length` tokens, estimated as one for three characters of ASCII, because rows
    are joined before they are tokenized. Returns them with a summary, empty if none was joined.
    """
    rng, conversations = random.Random(f"{seed}/join"), rows.extract(CONVERSATIONS)
    ends = np.cumsum([part.size for part in rows.parts])
    sources = np.searchsorted(ends, np.arange(len(rows)), "right").tolist()
    groups: dict[int, list[int]] = {}  # by the first row
    alike = defaultdict[str, list[int]](list)
    for n, one in enumerate(conversations):
        *before, question, answer = [message["role"] for message in one.messages] or ("", "")
        if [*before, question, answer] in (SINGLE, SINGLE[1:]):
            alike[repr((sources[n], one.messages[:-2], one.tools))].append(n)
        else:
            groups[n] = [n]
    for some in alike.values():
        rng.shuffle(some)
        while some:
            group = [some.pop() for _ in range(min(len(some), rng.randint(1, MAX_JOINED)))]
            while group[1:] and len(ascii([conversations[n] for n in group])) > 3 * max_length:
                some.append(group.pop())
            groups[min(group)] = group
    made = []
    for first, others in sorted(groups.items()):
        one, messages = conversations[first], list[Message]()
        for n, message in enumerate(one.messages):
            untrained = n < one.trained and message["role"] == "assistant"
            messages.append(message | {"weight": 0} if untrained else message)
        for other in others:
            messages += conversations[other].messages[-2:] if other != first else []
        tools = {"tools": [*one.tools]} if one.tools else {}
        made.append({"messages": messages, **tools} if messages else rows[first])
    kept = rows.select(np.array(sorted(groups), np.int64))
    text = f"join: {len(rows):,} rows, number of conversations: {len(made):,}"
    return replace(kept, rows=made, known=None), text * (len(made) < len(rows))


def collate(examples: Sequence[Any], packed: bool, pad_id: int) -> dict[str, Tensor]:
    """Returns the model inputs for examples with `ids` (T,) and unshifted `labels` (T,).

    If packed, they are input_ids, position_ids and labels, (1, T), with T as the sum of the
    lengths. Otherwise they are input_ids, attention_mask and labels, (B, T), padded on the right.
    The returned labels are shifted: labels[b, t] is the token after position t, or -100 if the loss
    ignores it.
    """
    ids = [torch.tensor(e.ids, dtype=torch.long) for e in examples]
    targets = [torch.tensor([*e.labels[1:], NO_LOSS], dtype=torch.long) for e in examples]
    if packed:
        positions = [torch.arange(len(i)) for i in ids]
        tensors = {"input_ids": ids, "position_ids": positions, "labels": targets}
        return {name: torch.cat(parts)[None] for name, parts in tensors.items()}

    def pad(sequences: list[Tensor], value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)

    mask = pad([torch.ones_like(i) for i in ids], 0)
    return {"input_ids": pad(ids, pad_id), "attention_mask": mask, "labels": pad(targets, NO_LOSS)}


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs documents into sequences of at most `capacity` tokens, by best fit decreasing. A
    document that is longer gets a separate sequence. Returns ascending indices.
    """
    sequences: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [n for n, left in enumerate(free) if left >= lengths[i]]
        chosen = min(fitting, key=free.__getitem__, default=len(free))
        if not fitting:
            sequences.append([])
            free.append(capacity)
        sequences[chosen].append(i)
        free[chosen] -= lengths[i]
    return [sorted(indices) for indices in sequences]


def micro_batches(
    examples: Sequence[Any],
    n: int,
    capacity: int | None = None,
    size: Callable[[Any], int] = lambda example: len(example.ids),
) -> list[Sequence[Any]]:
    share = ceil(len(examples) / n)
    runs = [examples[i : i + share] for i in range(0, len(examples), share)]
    if capacity is None:
        return runs
    return [
        [run[i] for i in sequence]
        for run in runs
        for sequence in best_fit([*map(size, run)], capacity)
    ]


def num_targets(example: Example) -> int:
    """Returns the number of tokens in the loss, which excludes an example's first token."""
    return sum(label != NO_LOSS for label in example.labels[1:])


class BatchFeed(ABC):
    """The examples of `steps` training steps. The examples of the first `num_previewed` steps are
    cheap to inspect before training.
    """

    num_previewed: int
    steps: int
    summary = ""  # a line to print after the last step

    @abstractmethod
    def after(self, step: int) -> Iterator[Sequence[Any]]:
        """Yields the examples of each step after `step`."""

    @abstractmethod
    def random_batches(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        """Yields `n` random batches, which don't affect the training steps."""


class StoredFeed(BatchFeed):
    num_previewed = 1000

    def __init__(
        self,
        examples: Sequence[Any],
        parts: Sequence[SourcePart],
        batch: int,
        steps: int,
        seed: int,
    ) -> None:
        self.examples, self.steps, self.batch = examples, steps, batch
        # the first example of each row; without `rows`, each row has one example
        rows = getattr(examples, "rows", np.arange(len(examples)))
        self._borders = np.append(np.flatnonzero(np.diff(rows, prepend=-1)), len(examples))
        self._batches = Batches(parts, batch, steps, seed)
        self.num_epochs = steps * batch / max(1, len(self._borders) - 1)

    def with_examples(self, change: Callable[[Any], Sequence[Any]]) -> StoredFeed:
        changed = copy.copy(self)
        changed.examples = change(self.examples)
        return changed

    def after(self, step: int) -> Iterator[Sequence[Any]]:
        borders = self._borders.tolist()
        for i in range(step, self.steps):
            indices = (range(borders[n], borders[n + 1]) for n in self._batches[i])
            yield [self.examples[i] for row in indices for i in row]

    def random_batches(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        parts = [SourcePart(len(self._borders) - 1)]
        return StoredFeed(self.examples, parts, size, n, seed).after(0)
