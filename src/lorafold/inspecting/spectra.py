"""How much of an update is real: figures of its singular values, and the rank that would do.

    energy            s_i^2 / |dW|^2, |.| the Frobenius norm
    effective rank p  the fewest directions that hold the share p of the energy
    stable rank       |dW|^2 / s_1^2                                        Rudelson and Vershynin
                      2007, arXiv math/0503442
    entropy rank      exp(-sum p_i log p_i), p_i = s_i / sum s              Roy and Vetterli 2007,
                      "The effective rank"
    relative norm     |dW| / |W0|

All are numbers without a unit. A rank is advised as 1, 2 or the smallest multiple of 4 that holds
95%.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count

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


def spectrum(s: Tensor, nominal: int | None) -> dict[str, float | int | bool]:
    """The figures of one site by their names in the JSON.

    `rank` is the nominal one, or the one found where a method has no factors.
    """
    ranks: dict[str, float | int | bool] = {
        "rank": len(s) if nominal is None else nominal,
        "numerical_rank": len(s),
    }
    ranks |= {f"effective_rank_{share * 100:.0f}": effective_rank(s, share) for share in SHARES}
    return {
        **ranks,
        "factored": nominal is not None,
        "stable_rank": stable_rank(s),
        "entropy_rank": entropy_rank(s),
    }


def pooled_loss(s: Sequence[Tensor], rank: int) -> float:
    """The share of the energy of all sites together that truncation of each to a rank loses."""
    total = float(sum(x.double().square().sum() for x in s))
    return float(sum(x[rank:].double().square().sum() for x in s)) / total if total else 0.0


def holding(s: Sequence[Tensor], ranks: Iterable[int]) -> int:
    """The first of these ranks that, at every site, holds 95% of the energy of all together."""
    return next(rank for rank in ranks if pooled_loss(s, rank) <= 1 - ENOUGH)


def pooled(s: Sequence[Tensor]) -> dict[str, float | int]:
    """One rank for all sites: the least that holds 95% of the energy of all together, the one
    advised, and what that one loses. 0 where all are zero.
    """
    rank = holding(s, chain((0, 1, 2), count(4, 4)))
    return {
        "rank_95": holding(s, count()),
        "advised_rank": rank,
        "advised_loss": pooled_loss(s, rank),
    }


def advice(given: int | None, found: Mapping[str, float | int]) -> str:
    """The same in words: "r=16 was given, 6 hold 95%: resize to 8 loses 2.1%"."""
    if not found["rank_95"]:
        return "the update is zero: nothing was learnt"
    start = (
        f"{f'r={given} was given' if given else 'no one rank was given'}, {found['rank_95']}"
        " hold 95%"
    )
    if given is not None and found["advised_rank"] >= given:
        return (
            f"{start}:"
            f" {'all of it is used, and more may help' if found['rank_95'] >= given else 'keep it'}"
        )
    return (
        f"{start}: resize to {found['advised_rank']} loses {found['advised_loss']:.1%} of the"
        " energy"
    )
