"""Batches: shuffling, held-out split, packing, shared prefixes, collation.

Feeds depend only on their arguments, so a resumed run computes the same batches. Rows are merged
into a forest of shared prefixes; a token with different targets is in each of its rows.

    rows     a b c d         tokens   a b c d  e  f       each node once, depth first
             a b e           lens     4  3  1             of the rows, in that order
             f               starts   0  2  0             tokens shared with the previous row
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lorafold.data.arrow import Array
from lorafold.data.examples import NO_LOSS, Example
from lorafold.data.formats import Row
from lorafold.data.row_store import Rows, SourcePart
from lorafold.errors import LorafoldError


class Batches(Sequence[list[int]]):
    """The example indices of each step, (steps, batch).

    Epochs are shuffled and concatenated, so every batch is full and may span two. From a source
    with weight w and n examples, an epoch takes the next round(w n), in an order that continues
    across epochs.
    """

    def __init__(
        self, parts: int | Sequence[SourcePart], batch: int, steps: int, seed: int
    ) -> None:
        self._parts = [SourcePart(parts)] if isinstance(parts, int) else list(parts)
        self._taken = [epoch_size([part]) for part in self._parts]
        self._batch, self._steps, self._seed = batch, steps, seed
        if not sum(self._taken):
            raise LorafoldError("data: no rows to train on, expected at least one")
        self._order = lru_cache(2)(self._epoch)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        if not 0 <= index < self._steps:
            raise IndexError(index)
        size, start = sum(self._taken), index * self._batch
        return [int(self._order(at // size)[at % size]) for at in range(start, start + self._batch)]

    def _epoch(self, epoch: int) -> Array:
        first, pool = 0, []
        for number, (part, taken) in enumerate(zip(self._parts, self._taken, strict=True)):
            own = np.arange(part.size, dtype=np.int32)
            if taken != part.size:
                # the next ones; the source is shuffled again each time it is exhausted
                turn, at = divmod(epoch * taken, part.size)
                drawn: list[int] = []
                while len(drawn) < at + taken:
                    rng = random.Random(f"{self._seed}/source {number}/{turn}")
                    drawn += rng.sample(range(part.size), part.size)
                    turn += 1
                own = np.sort(np.array(drawn[at : at + taken], np.int32))
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


def collate(examples: Sequence[Any], packed: bool, pad_id: int) -> dict[str, Tensor]:
    """Returns the tensors of a forward pass over examples with `ids` (T,) and unshifted `labels`
    (T,).

    Packed: input_ids, position_ids and labels, (1, T), T the sum of the lengths. Otherwise padded
    on the right: input_ids, attention_mask and labels, (B, T). The returned labels are shifted:
    labels[b, t] is the token after position t, or -100 if the loss ignores it.
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
    """Packs documents into sequences of at most `capacity` tokens, by best fit decreasing. A longer
    document gets its own. Returns ascending indices.
    """
    sequences: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [n for n, left in enumerate(room) if left >= lengths[i]]
        chosen = min(fitting, key=room.__getitem__, default=len(room))
        if not fitting:
            sequences.append([])
            room.append(capacity)
        sequences[chosen].append(i)
        room[chosen] -= lengths[i]
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


def labelled(example: Example) -> int:
    """Counts the tokens in the loss, which excludes an example's first token."""
    return sum(label != NO_LOSS for label in example.labels[1:])


class BatchFeed(ABC):
    """The examples of `steps` steps, of which `foreseen` are cheap to inspect in advance."""

    foreseen: int
    steps: int
    summary = ""  # a line to print after the last step

    @abstractmethod
    def after(self, step: int) -> Iterator[Sequence[Any]]:
        """Yields the examples of each step after `step`."""

    @abstractmethod
    def drawn(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        """Yields `n` random batches, independent of the training steps."""


class StoredFeed(BatchFeed):
    """A feed of stored examples; `passes` is the number of epochs."""

    foreseen = 1000

    def __init__(
        self,
        examples: Sequence[Any],
        parts: Sequence[SourcePart],
        batch: int,
        steps: int,
        seed: int,
    ) -> None:
        self.examples, self.steps, self.batch = examples, steps, batch
        # where the examples of each row begin; without `rows`, each row has one example
        rows = getattr(examples, "rows", np.arange(len(examples)))
        self._borders = np.append(np.flatnonzero(np.diff(rows, prepend=-1)), len(examples))
        self._batches = Batches(parts, batch, steps, seed)
        self.passes = steps * batch / max(1, len(self._borders) - 1)

    def with_examples(self, change: Callable[[Any], Sequence[Any]]) -> StoredFeed:
        changed = copy.copy(self)
        changed.examples = change(self.examples)
        return changed

    def after(self, step: int) -> Iterator[Sequence[Any]]:
        borders = self._borders.tolist()
        for i in range(step, self.steps):
            indices = (range(borders[n], borders[n + 1]) for n in self._batches[i])
            yield [self.examples[i] for row in indices for i in row]

    def drawn(self, n: int, size: int, seed: int) -> Iterator[Sequence[Any]]:
        parts = [SourcePart(len(self._borders) - 1)]
        return StoredFeed(self.examples, parts, size, n, seed).after(0)


R = TypeVar("R")
EMPTY: Array = np.zeros(0, np.int64)
PAYS = 0.95  # if more tokens than this share remain, a forest costs more than it saves
WINDOW = 1024  # rows among which shared prefixes are searched for in passes without training


@dataclass(frozen=True)
class Forest:
    """Rows merged by shared prefix. Of each token (T,): id, position, target (-100 for none), the
    number of rows that train it, and the first row with it.

    `places` are the tokens of each row and `trained` those it trains. For `lens` and `starts` see
    `ops.packed_documents.Documents`.
    """

    ids: Array
    positions: Array
    targets: Array
    counts: Array
    first: Array
    places: tuple[Array, ...]
    trained: tuple[Array, ...]
    lens: tuple[int, ...]
    starts: tuple[int, ...]

    def rows(self) -> Tensor:
        """Counts the rows with each token, (1, T)."""
        return torch.from_numpy(np.bincount(np.concatenate(self.places)))[None]

    def tensors(self) -> dict[str, Tensor]:
        """Returns input_ids, position_ids, labels, counts and document, each (1, T), and lens
        (n, 2).
        """
        tokens = {
            "input_ids": self.ids, "position_ids": self.positions, "labels": self.targets,
            "counts": self.counts, "document": self.first,
        }  # fmt: skip
        tensors = {name: torch.from_numpy(array)[None] for name, array in tokens.items()}
        return tensors | {"lens": torch.tensor([self.lens, self.starts]).t()}


def forest(
    rows: Sequence[Any],
    limits: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> Forest:
    """Merges rows with unshifted labels. Each may share at most its `limits` tokens and, with
    ascending `groups`, only within its group.
    """
    size = sum(len(row.ids) for row in rows)
    ids, positions, first, counts = (np.zeros(size, np.int64) for _ in range(4))
    targets = np.full(size, NO_LOSS, np.int64)
    lens: list[int] = []
    starts = []
    places, of_rows = ([np.zeros(0, np.int64)] * len(rows) for _ in range(2))
    path, limit, end = np.zeros(0, np.int64), size, 0  # of the previous row; tokens so far
    group, order = None, range(len(rows))
    for n in order if groups else sorted(order, key=lambda n: tuple(rows[n].ids)):
        own, wanted = np.array(rows[n].ids), np.array([*rows[n].labels[1:], NO_LOSS])
        before, limit = limit, size if limits is None else limits[n]
        shared = min(_common(ids[path], own, targets[path], wanted), before, limit)
        if groups:
            shared, group = shared * (groups[n] == group), groups[n]
        if lens and shared == len(path):
            lens[-1] = len(own)
        else:
            lens.append(len(own))
            starts.append(shared)
        new = np.arange(end, end := end + len(own) - shared)
        ids[new], positions[new], first[new] = own[shared:], np.arange(shared, len(own)), n
        path = np.concatenate([path[:shared], new])
        trained = wanted != NO_LOSS
        places[n], of_rows[n] = path, path[trained]
        targets[of_rows[n]] = wanted[trained]
        counts[of_rows[n]] += 1
        first[path] = np.minimum(first[path], n)
    return Forest(
        ids[:end], positions[:end], targets[:end], counts[:end], first[:end], tuple(places),
        tuple(of_rows), tuple(lens), tuple(starts),
    )  # fmt: skip


def leaders(rows: Sequence[Sequence[int]]) -> list[Array]:
    """Returns, for each token of each row (t,), the first row with the same prefix through it."""
    first = np.full(sum(map(len, rows)), len(rows), np.int64)  # of each node
    of_rows, path, ids, end = [first[:0]] * len(rows), first[:0], first[:0], 0
    for n in sorted(range(len(rows)), key=lambda n: tuple(rows[n])):
        before, ids = ids, np.array(rows[n], np.int64)
        shared = _common(before, ids)
        path = np.concatenate([path[:shared], np.arange(end, end := end + len(ids) - shared)])
        of_rows[n] = path
        first[path] = np.minimum(first[path], n)
    return [first[path] for path in of_rows]


def alike(
    rows: Sequence[R],
    n: int,
    capacity: int,
    beginning: Callable[[R], Sequence[int]],
    size: Callable[[R], int] | None = None,
) -> list[Sequence[R]]:
    """Divides rows into `n` micro-batches, or more of at most `capacity` tokens, sorted by prefix.
    `size` is a row's tokens, by default its prefix's.
    """
    parts: list[Sequence[R]] = []
    part: list[R] = []
    tokens, share, ids = 0, ceil(len(rows) / n), np.zeros(0, np.int64)
    for place, row in enumerate(sorted(rows, key=lambda row: tuple(beginning(row)))):
        before, ids = ids, np.array(beginning(row))
        own = size(row) if size else len(ids)
        shared = _common(before, ids)
        # if both continue, their last shared token may have two targets, and then is not shared
        tokens += own - max(0, shared - (shared < min(len(before), len(ids))))
        if place % share == 0 or tokens > capacity:
            parts.append(part := [])
            tokens = own
        part.append(row)
    return parts


def _common(before: Array, ids: Array, targets: Array = EMPTY, wanted: Array = EMPTY) -> int:
    """Counts the leading ids that a row (u,) shares with the previous one (t,), up to two different
    targets.
    """
    n = min(len(before), len(ids))
    same = before[:n] == ids[:n]
    if len(wanted):
        there, here = targets[:n], wanted[:n]
        same &= (there == here) | (there == NO_LOSS) | (here == NO_LOSS)
    return n if same.all() else int(same.argmin())
