"""The arithmetic at one site: which entries of each update stay, and how the updates become one.

    sum             sum_i w_i dW_i; of factors [w_1 B_1, w_2 B_2 ...] [A_1; A_2 ...], which is exact
    disjoint mean   for each entry, the mean of those w_i dW_i that have the elected sign,
                    sign(sum_i w_i dW_i)                                              (TIES)

    trim            keep the share `density` of the entries, the largest; set the others to 0
                    (TIES, magnitude pruning)
    drop            keep each entry with probability `density` and divide it by `density`; set the
                    others to 0                                                       (DARE)

Task arithmetic: Ilharco et al. 2023, arXiv 2212.04089; TIES: Yadav et al. 2023, arXiv 2306.01708,
sec. 3; DARE: Yu et al. 2024, arXiv 2311.03099, eq. 1. Unlike TIES' paper, which ranks the entries
of the whole model, `trim` ranks those of one matrix, so that only one dense update is in memory.
The signs are elected after the updates are weighted, so a negative weight reverses its adapter's
vote; where the sum is 0 no sign is elected, so A and -A cancel under TIES too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from lorafold.composing.updates import Change, dense
from lorafold.ops.svd import best_of_rank, svd_of_product

# (dW, density, generator) -> dW with entries set to 0
Kept = Callable[[Tensor, float, torch.Generator], Tensor]
Joined = Callable[[Sequence[Change]], Change]  # [w_i dW_i] -> their composition


def times(change: Change, weight: float) -> Change:
    """w dW; of factors, the up factor is multiplied."""
    return (weight * change[0], change[1]) if isinstance(change, tuple) else weight * change


def summed(changes: Sequence[Change]) -> Change:
    """The sum of updates: as factors end to end if all have factors, else dense."""
    factors = [change for change in changes if isinstance(change, tuple)]
    if len(factors) == len(changes):
        ups, downs = zip(*factors, strict=True)
        return torch.cat(ups, 1), torch.cat(downs, 0)
    return reduce(torch.add, map(dense, changes))


def disjoint_mean(changes: Sequence[Change]) -> Tensor:  # (out, in)
    """For each entry, the mean of the updates that have the sign of their sum (TIES, sec. 3)."""
    updates = torch.stack([dense(change) for change in changes])  # (n, out, in)
    elected = updates.sum(0).sign()
    agree = (updates.sign() == elected) & (elected != 0)
    return (updates * agree).sum(0) / agree.sum(0).clamp_min(1)


def trim(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The largest entries of an update, the others 0.

    Args:
        update: dW, (out, in).
        density: The share of entries that stay, at least one.
        generator: Not used; `drop` has the same parameters.
    """
    sizes = update.abs()
    kept = max(1, round(density * update.numel()))
    least = sizes.flatten().kthvalue(update.numel() - kept + 1).values
    return torch.where(sizes >= least, update, 0)


def drop(update: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Random entries of an update, divided by `density`, the others 0 (DARE, eq. 1).

    Args:
        update: dW, (out, in).
        density: The probability that an entry stays.
        generator: Draws the entries, on the CPU.
    """
    kept = torch.rand(update.shape, generator=generator) < density
    return torch.where(kept, update / density, 0)


def cut(change: Change, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of at most this rank: (up (out, r), down (r, in), |up down - dW|^2).

    Factors of no higher rank are returned as they are.
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
    """<dW_a, dW_b> in fp64. Of factors it is tr((B_a^T B_b) (A_b A_a^T)), which needs no dense
    update.
    """
    if isinstance(a, tuple) and isinstance(b, tuple):
        (up_a, down_a), (up_b, down_b) = ((up.double(), down.double()) for up, down in (a, b))
        return ((up_a.t() @ up_b) * (down_a @ down_b.t())).sum().item()
    return (dense(a).double() * dense(b).double()).sum().item()
