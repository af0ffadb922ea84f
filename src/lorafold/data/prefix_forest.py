"""Shared prefixes: rows are merged into a forest, so that a prefix is computed once.

A token with different targets is in each of its rows.

    rows     a b c d         tokens   a b c d  e  f       each node once, depth first
             a b e           lens     4  3  1             of the rows, in that order
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
from lorafold.data.examples import NO_LOSS

R = TypeVar("R")
EMPTY: Array = np.zeros(0, np.int64)
MAX_SIZE = 0.95  # as a share of its rows' tokens; a larger forest costs more than it saves
WINDOW = 1024  # rows among which shared prefixes are searched for without training


@dataclass(frozen=True)
class PrefixForest:
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


def prefix_forest(
    rows: Sequence[Any],
    limits: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> PrefixForest:
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
        shared = min(_num_shared(ids[path], own, targets[path], wanted), before, limit)
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
    return PrefixForest(
        ids[:end], positions[:end], targets[:end], counts[:end], first[:end], tuple(places),
        tuple(of_rows), tuple(lens), tuple(starts),
    )  # fmt: skip


def owners(rows: Sequence[Sequence[int]]) -> list[Array]:
    """Returns, for each token of each row (t,), the first row with the same prefix through it."""
    first = np.full(sum(map(len, rows)), len(rows), np.int64)  # of each node
    of_rows, path, ids, end = [first[:0]] * len(rows), first[:0], first[:0], 0
    for n in sorted(range(len(rows)), key=lambda n: tuple(rows[n])):
        before, ids = ids, np.array(rows[n], np.int64)
        shared = _num_shared(before, ids)
        path = np.concatenate([path[:shared], np.arange(end, end := end + len(ids) - shared)])
        of_rows[n] = path
        first[path] = np.minimum(first[path], n)
    return [first[path] for path in of_rows]


def batches_by_prefix(
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
        shared = _num_shared(before, ids)
        # if both continue, their last shared token may have two targets, and then is not shared
        tokens += own - max(0, shared - (shared < min(len(before), len(ids))))
        if place % share == 0 or tokens > capacity:
            parts.append(part := [])
            tokens = own
        part.append(row)
    return parts


def _num_shared(before: Array, ids: Array, targets: Array = EMPTY, wanted: Array = EMPTY) -> int:
    """Counts the leading ids that a row (u,) shares with the previous one (t,), up to two different
    targets.
    """
    n = min(len(before), len(ids))
    same = before[:n] == ids[:n]
    if len(wanted):
        old, new = targets[:n], wanted[:n]
        same &= (old == new) | (old == NO_LOSS) | (new == NO_LOSS)
    return n if same.all() else int(same.argmin())
