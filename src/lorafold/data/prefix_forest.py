"""Shared prefixes: rows are merged into a forest (prefix trees), so that each prefix is computed
once.

A token that has different targets in two rows is not shared.

    rows     a b c d         tokens   a b c d  e  f       each node once, depth first
             a b e           lens     4  3  1             lengths of the rows, in this order
             f               starts   0  2  0             tokens shared with the previous row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorafold.data.arrow import Array
from lorafold.data.examples import NO_LOSS, Example

R = TypeVar("R")
EMPTY: Array = np.zeros(0, np.int64)
MAX_SIZE = 0.95  # fraction of its rows' tokens; a larger forest costs more than it saves
WINDOW = 1024  # rows that are searched for shared prefixes when not training


@dataclass(frozen=True)
class PrefixForest:
    """Rows merged by shared prefixes. Each token has an id, a position, a target (-100 for none),
    the number of rows that train it (`counts`) and the first row that contains it, all (T,).

    `places` are the indices of each row's tokens, and `trained` the indices that it trains. `lens`
    and `starts` are explained in `ops.packed_documents.Documents`.
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
        """Returns the number of rows that contain each token, (1, T)."""
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


def prefix_forest(
    rows: Sequence[Any], limits: Sequence[int] | None = None, groups: Sequence[int] | None = None
) -> PrefixForest:
    """Merges rows with unshifted labels. Row n shares at most `limits[n]` tokens. With `groups`,
    which must be ascending, rows share only within their group.
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
        own = np.array(rows[n].ids, np.int64)
        row_targets = np.array([*rows[n].labels[1:], NO_LOSS])[: len(own)]
        before, limit = limit, size if limits is None else limits[n]
        shared = min(_num_shared(ids[path], own, targets[path], row_targets), before, limit)
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
        trained = row_targets != NO_LOSS
        places[n], of_rows[n] = path, path[trained]
        targets[of_rows[n]] = row_targets[trained]
        counts[of_rows[n]] += 1
        first[path] = np.minimum(first[path], n)
    return PrefixForest(
        ids[:end], positions[:end], targets[:end], counts[:end], first[:end], tuple(places),
        tuple(of_rows), tuple(lens), tuple(starts),
    )  # fmt: skip


def owners(rows: Sequence[Sequence[int]]) -> list[Array]:
    """Returns, for each token of each row (t,), the first row with the same prefix up to this
    token.
    """
    forest = prefix_forest([Example(tuple(ids), (NO_LOSS,) * len(ids)) for ids in rows])
    return [forest.first[path] for path in forest.places]


def batches_by_prefix(
    rows: Sequence[R],
    n: int,
    capacity: int,
    beginning: Callable[[R], Sequence[int]],
    size: Callable[[R], int] | None = None,
) -> list[Sequence[R]]:
    """Sorts rows by prefix and divides them into about `n` micro-batches, or more if needed for at
    most `capacity` tokens each. `size` returns the number of tokens of a row, by default of its
    prefix.
    """
    parts: list[Sequence[R]] = []
    part: list[R] = []
    tokens, share, ids = 0, ceil(len(rows) / n), np.zeros(0, np.int64)
    for place, row in enumerate(sorted(rows, key=lambda row: tuple(beginning(row)))):
        before, ids = ids, np.array(beginning(row))
        size_of_row = size(row) if size else len(ids)
        shared = _num_shared(before, ids)
        # if both rows continue, their last common token may have two targets, so it is not shared
        tokens += size_of_row - max(0, shared - (shared < min(len(before), len(ids))))
        if place % share == 0 or tokens > capacity:
            parts.append(part := [])
            tokens = size_of_row
        part.append(row)
    return parts


def _num_shared(before: Array, ids: Array, targets: Array = EMPTY, labels: Array = EMPTY) -> int:
    """Returns the number of leading ids that a row (u,) shares with the previous row (t,), up to
    the first token with two different targets.
    """
    n = min(len(before), len(ids))
    same = before[:n] == ids[:n]
    if len(labels):
        old, new = targets[:n], labels[:n]
        same &= (old == new) | (old == NO_LOSS) | (new == NO_LOSS)
    return n if same.all() else int(same.argmin())
