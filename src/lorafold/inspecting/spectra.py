"""Figures of the singular values of an update, and the rank that would be enough for it.

    energy            s_i^2 / |dW|^2, |.| the Frobenius norm
    effective rank p  the smallest number of directions that hold the share p of the energy
    stable rank       |dW|^2 / s_1^2            Rudelson and Vershynin 2007, arXiv math/0503442
    entropy rank      exp(-sum p_i log p_i), p_i = s_i / sum s
                                                Roy and Vetterli 2007, "The effective rank"
    relative norm     |dW| / |W0|

No figure has a unit. The advised rank is 1, 2 or the smallest multiple of 4 that holds 95% of the
energy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SHARES = (0.90, 0.95, 0.99)
ENOUGH = 0.95


def energy(s: Tensor) -> Tensor:  # (k,) -> (k,)
    """The share of the energy in the first 1, 2, ... k directions."""
    squares = s.double().square()
    return squares.cumsum(0) / squares.sum()


def effective_rank(s: Tensor, share: float) -> int:  # (k,)
    """The smallest number of directions that hold a share of the energy; 0 for a zero update."""
    # the tolerance is for the rounding of the sum, so that a share of 1 is reached
    return int((energy(s) < share * (1 - 1e-12)).sum()) + 1 if len(s) else 0


def stable_rank(s: Tensor) -> float:  # (k,)
    """|dW|^2 / s_1^2; 0 for a zero update."""
    return float(s.double().square().sum() / s[0].double().square()) if len(s) else 0.0


def entropy_rank(s: Tensor) -> float:  # (k,)
    """exp of the entropy of s / sum s; 0 for a zero update."""
    p = s.double() / s.double().sum()
    return float(torch.exp(torch.special.entr(p).sum())) if len(s) else 0.0


def spectrum(s: Tensor, nominal: int | None) -> dict[str, float | int | bool]:  # (k,)
    """The figures of one site by their names in the JSON. `rank` is the nominal rank, or the
    numerical one if the method has no factors and `nominal` is None.
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


def pooled_loss(energies: Tensor, rank: int) -> float:  # (k,)
    """The share of the energy of all sites that is lost if each is cut to a rank.

    Args:
        energies: The energy of each direction, summed over the sites, (k,) in fp64.
    """
    total = float(energies.sum())
    return float(energies[rank:].sum()) / total if total else 0.0


def holding(energies: Tensor, ranks: Iterable[int]) -> int:  # (k,)
    """The first of these ranks at which all sites, cut to it, hold 95% of their common energy."""
    return next(rank for rank in ranks if pooled_loss(energies, rank) <= 1 - ENOUGH)


def pooled(s: Sequence[Tensor]) -> dict[str, float | int]:  # (k,) for each site
    """One rank for all sites: the smallest that holds 95% of their common energy, the advised rank,
    and the share of the energy that the advised rank loses. 0 where all updates are zero.
    """
    energies = pad_sequence(list(s), batch_first=True).double().square().sum(0)
    rank = holding(energies, chain((0, 1, 2), count(4, 4)))
    return {
        "rank_95": holding(energies, count()),
        "advised_rank": rank,
        "advised_loss": pooled_loss(energies, rank),
    }


def advice(given: int | None, found: Mapping[str, float | int]) -> str:
    """The figures of `pooled` as a sentence, for an update of the rank `given`, or None if sites
    have different ranks or none.
    """
    if not found["rank_95"]:
        return "the update is zero: training changed nothing"
    enough, advised = found["rank_95"], found["advised_rank"]
    start = f"rank {enough} holds 95% of the energy"
    if given is None:
        start += " (the adapter has no single rank)"
    elif advised >= given:
        verdict = "use a higher rank if you can" if enough >= given else "keep this rank"
        return f"{start}, and the adapter has rank {given}: {verdict}"
    else:
        start += f", and the adapter has rank {given}"
    return f"{start}: resizing it to rank {advised} loses {found['advised_loss']:.1%} of the energy"
