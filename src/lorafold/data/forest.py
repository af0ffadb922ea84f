"""Rows that begin alike, as a forest: what several have in common is one path, to any depth.

    rows     a b c d         tokens   a b c d  e  f       each node once, depth first
             a b e           lens     4  3  1             of the rows, in that order
             f               starts   0  2  0             the tokens that the row before has too

A token is computed once and counts for every row that trains on it. It can predict one token only:
where rows go on with different ones and train on both, the token before is in each of them. A row
that another goes on from is a part of it, and equal rows are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lorafold.data.arrow import Array
from lorafold.data.batches import WithLabels
from lorafold.data.examples import NO_LOSS

R = TypeVar("R")
PAYS = 0.05  # of the tokens; a smaller part in common costs more than it saves
WINDOW = 1024  # rows among which those that begin alike are looked for, where nothing is trained


@dataclass(frozen=True)
class Forest:
    """Of each token (T,): its id, position, target (-100 for none), how many rows train on it, and
    the first row that it is of. `places` are those of each row's tokens, `trained` of those that it
    trains on. `lens` and `starts` are as `ops.documents.Documents` has them.
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
        """How many rows have each token, (1, T)."""
        return torch.from_numpy(np.bincount(np.concatenate(self.places)))[None]

    def tensors(self) -> dict[str, Tensor]:
        """input_ids, position_ids, labels, counts and document, each (1, T), and lens (n, 2)."""
        tokens = {
            "input_ids": self.ids, "position_ids": self.positions, "labels": self.targets,
            "counts": self.counts, "document": self.first,
        }  # fmt: skip
        found = {name: torch.from_numpy(array)[None] for name, array in tokens.items()}
        return found | {"lens": torch.tensor([self.lens, self.starts]).t()}


def forest(
    rows: Sequence[WithLabels],
    limits: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
) -> Forest:
    """The forest of tokenized rows with unshifted labels.

    Args:
        limits: the most tokens that each may share; None: all.
        groups: which of them may share with each other, ascending; None: all. Those of a group have
            the first tokens in common, up to their limits.
    """
    size = sum(len(row.ids) for row in rows)
    ids, positions, first, counts = (np.zeros(size, np.int64) for _ in range(4))
    targets = np.full(size, NO_LOSS, np.int64)
    lens, starts = list[int](), list[int]()
    places, of_rows = ([np.zeros(0, np.int64)] * len(rows) for _ in range(2))
    path, limit, end = np.zeros(0, np.int64), size, 0  # of the row before; the tokens so far
    group, order = None, range(len(rows))
    for n in order if groups else sorted(order, key=lambda n: tuple(rows[n].ids)):
        own, wanted = np.array(rows[n].ids), np.array([*rows[n].labels[1:], NO_LOSS])
        before, limit = limit, size if limits is None else limits[n]
        shared = min(_common(ids[path], targets[path], own, wanted), before, limit)
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
    """Of each token of each row, (t,): the first row that begins with the same tokens up to it.

    Args:
        rows: the ids of what each may have in common with others.
    """
    first = np.full(sum(map(len, rows)), len(rows), np.int64)  # of each node
    of_rows, path, ids, end = [first[:0]] * len(rows), first[:0], first[:0], 0
    for n in sorted(range(len(rows)), key=lambda n: tuple(rows[n])):
        before, ids = ids, np.array(rows[n], np.int64)
        shared = _common(before, before, ids, ids)
        path = np.concatenate([path[:shared], np.arange(end, end := end + len(ids) - shared)])
        of_rows[n] = path
        first[path] = np.minimum(first[path], n)
    return [first[path] for path in of_rows]


def pays(once: int, apart: int) -> bool:
    """Whether rows are computed faster as a forest than apart.

    Args:
        once, apart: the tokens that are computed so.
    """
    return once <= (1 - PAYS) * apart


def alike(
    rows: Sequence[R],
    n: int,
    capacity: int,
    beginning: Callable[[R], Sequence[int]],
    size: Callable[[R], int],
) -> list[Sequence[R]]:
    """Divide the rows of an optimizer step into micro-batches in which those that begin alike meet.

    Args:
        n: the number of micro-batches; there are more where their tokens would exceed the capacity.
        capacity: the tokens that a packed sequence may have. A longer row has one of its own.
        beginning: the ids that a row may have in common with others.
        size: the tokens of a row.
    """
    found: list[list[R]] = []
    tokens, share, ids = 0, ceil(len(rows) / n), np.zeros(0, np.int64)
    for place, row in enumerate(sorted(rows, key=lambda row: tuple(beginning(row)))):
        before, ids = ids, np.array(beginning(row))
        common = _common(before, before, ids, ids)
        # where both go on, the last may predict another token in each, and then is in both
        tokens += size(row) - max(0, common - (common < min(len(before), len(ids))))
        if place % share == 0 or tokens > capacity:
            found.append([])
            tokens = size(row)
        found[-1].append(row)
    return list(found)


def _common(ids: Array, targets: Array, own: Array, wanted: Array) -> int:
    """How many tokens a row has in common with the one before, up to one that predicts another.

    Args:
        ids, targets: of the row before, (t,).
        own, wanted: of the row, (u,).
    """
    n = min(len(ids), len(own))
    targets, wanted = targets[:n], wanted[:n]
    either = (targets == wanted) | (targets == NO_LOSS) | (wanted == NO_LOSS)
    same = (ids[:n] == own[:n]) & either
    return n if same.all() else int(same.argmin())
