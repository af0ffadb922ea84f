"""How much of an update is real: figures of its singular values, and the rank that would do.

    energy            s_i^2 / |dW|^2, |.| the Frobenius norm
    effective rank p  the fewest directions that hold the share p of the energy
    stable rank       |dW|^2 / s_1^2                                        Rudelson and Vershynin 2007, arXiv math/0503442
    entropy rank      exp(-sum p_i log p_i), p_i = s_i / sum s              Roy and Vetterli 2007, "The effective rank"
    relative norm     |dW| / |W0|

All are numbers without a unit. A rank is advised as the smallest power of two that holds 95% of the energy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SHARES = (0.90, 0.95, 0.99)
ENOUGH = 0.95


def energy(s: Tensor) -> Tensor:  # (k,) -> (k,), the share that the first 1, 2, ... directions hold
    squares = s.double().square()
    return squares.cumsum(0) / squares.sum()


def effective_rank(s: Tensor, share: float) -> int:
    """0 for an update of nothing. A share of 1 takes all; the sum's own rounding doesn't count."""
    return int((energy(s) < share * (1 - 1e-12)).sum()) + 1 if len(s) else 0


def stable_rank(s: Tensor) -> float:
    return float(s.double().square().sum() / s[0].double().square()) if len(s) else 0.0


def entropy_rank(s: Tensor) -> float:
    p = s.double() / s.double().sum()
    return float(torch.exp(torch.special.entr(p).sum())) if len(s) else 0.0


def lost(s: Tensor, rank: int) -> float:
    """The share of the energy that truncation to a rank loses."""
    squares = s.double().square()
    return float(squares[rank:].sum() / squares.sum()) if len(s) else 0.0


def spectrum(s: Tensor, rank: int | None) -> dict[str, float | int | None]:
    """The figures of one site by their names in the JSON; `rank` is the nominal one."""
    ranks: dict[str, float | int | None] = {"rank": rank, "numerical_rank": len(s)}
    ranks |= {f"effective_rank_{share * 100:.0f}": effective_rank(s, share) for share in SHARES}
    return {**ranks, "stable_rank": stable_rank(s), "entropy_rank": entropy_rank(s)}


def advised(s: Sequence[Tensor]) -> int:
    """The smallest power of two as a rank that holds 95% of the energy of all sites together; 1 for an update of nothing."""
    rank, total = 1, float(sum(x.double().square().sum() for x in s))
    while total and pooled_loss(s, rank) > 1 - ENOUGH:
        rank *= 2
    return rank


def pooled_loss(s: Sequence[Tensor], rank: int) -> float:
    """The share of the energy of all sites together that truncation of each to a rank loses."""
    total = float(sum(x.double().square().sum() for x in s))
    return float(sum(x[rank:].double().square().sum() for x in s)) / total if total else 0.0


def advice(s: Sequence[Tensor], rank: int | None, whole: str = "the update") -> str:
    """The same in words."""
    if not any(len(x) for x in s):
        return f"{whole} is zero: nothing was learnt, or it was not trained yet"
    longest = max(map(len, s))
    holds = next(k for k in range(1, longest + 1) if pooled_loss(s, k) <= 1 - ENOUGH)
    given = f"r={rank} was given" if rank else f"rank {longest} was found"
    resized = advised(s)
    if resized >= (rank or longest):
        return f"{given}, {holds} hold 95%: all of it is used, and more rank may help"
    return f"{given}, {holds} hold 95%: resize to {resized} loses {pooled_loss(s, resized):.1%} of the energy, " \
           f"{math.sqrt(pooled_loss(s, resized)):.1%} of the norm"  # fmt: skip
