"""Arithmetic of one site's updates: what is kept of each, and how they become one.

    sum             sum_i w_i dW_i                          [w_1 B_1, w_2 B_2 ...] [A_1; A_2 ...]:
                                                            exact, where there are factors
    disjoint mean   mean of those w_i dW_i whose sign is the elected one, sign(sum_i w_i dW_i),
                    entry by entry (TIES)

    trim            the share `density` of the entries that are largest, the others 0       (TIES,
                    magnitude pruning)
    drop            entries kept with probability `density`, divided by it, the others 0     (DARE)

Task arithmetic: Ilharco et al. 2023, arXiv 2212.04089; TIES: Yadav et al. 2023, arXiv 2306.01708,
sec. 3; DARE: Yu et al. 2024, arXiv 2311.03099, eq. 1. A dense update exists for one site at a time,
so the largest entries are those of a matrix, where TIES' paper ranks the whole model's. The weights
go in before the signs are elected, so that a negative one turns its adapter's vote; and where the
sum is 0 nobody is elected, so that A and -A are nothing under TIES too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from lorafold.composing.updates import Change, dense
from lorafold.ops.svd import best_of_rank, svd_of_product

# (dW, density, randomness) -> what is kept of it
Kept = Callable[[Tensor, float, torch.Generator], Tensor]
Joined = Callable[[Sequence[Change]], Change]  # of updates that carry their weights


def times(change: Change, weight: float) -> Change:
    return (weight * change[0], change[1]) if isinstance(change, tuple) else weight * change


def summed(changes: Sequence[Change]) -> Change:
    factors = [change for change in changes if isinstance(change, tuple)]
    if len(factors) == len(changes):
        ups, downs = zip(*factors, strict=True)
        return torch.cat(ups, 1), torch.cat(downs, 0)
    return reduce(torch.add, map(dense, changes))


def disjoint_mean(changes: Sequence[Change]) -> Tensor:
    updates = torch.stack([dense(change) for change in changes])  # (n, out, in)
    elected = updates.sum(0).sign()
    agree = (updates.sign() == elected) & (elected != 0)
    return (updates * agree).sum(0) / agree.sum(0).clamp_min(1)


def trim(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    sizes = update.abs()
    kept = max(1, round(density * update.numel()))
    least = sizes.flatten().kthvalue(update.numel() - kept + 1).values
    return torch.where(sizes >= least, update, 0)


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(update.shape, generator=generator) < density
    return torch.where(kept, update / density, 0)


def cut(change: Change, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best up (out, r), down (r, in) of at most that rank, and |up down - dW|^2.

    Factors of no higher rank stay as they are.
    """
    if not isinstance(change, tuple):
        up, down = best_of_rank(change, min(rank, *change.shape))
        return up, down, (up @ down - change).double().square().sum().item()
    up, down = change
    if rank >= len(down):
        return up, down, 0.0
    u, s, vt = svd_of_product(up, down)
    root = s[:rank].sqrt()
    return (
        (u[:, :rank] * root).float(),
        (root[:, None] * vt[:rank]).float(),
        s[rank:].square().sum().item(),
    )


def inner(a: Change, b: Change) -> float:
    """<dW_a, dW_b>, in fp64; of factors as tr((B_a^T B_b) (A_b A_a^T)), r_a r_b numbers, without
    either dense update.
    """
    if isinstance(a, tuple) and isinstance(b, tuple):
        (up_a, down_a), (up_b, down_b) = ((up.double(), down.double()) for up, down in (a, b))
        return ((up_a.t() @ up_b) * (down_a @ down_b.t())).sum().item()
    return (dense(a).double() * dense(b).double()).sum().item()
