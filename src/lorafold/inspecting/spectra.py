"""Figures of the singular values of an update, and the rank that would be enough for it.

    energy            s_i^2 / |dW|^2, |.| the Frobenius norm
    effective rank p  the smallest number of directions that hold the share p of the energy
    stable rank       |dW|^2 / s_1^2            Rudelson and Vershynin 2007, arXiv math/0503442
    entropy rank      exp(-sum p_i log p_i), p_i = s_i / sum s
                                                Roy and Vetterli 2007, "The effective rank"
    relative norm     |dW| / |W0|

No figure has a unit. The advised rank is 1, 2 or the smallest multiple of 4 that holds 95% of the
energy.

The subspaces of an update compared with those of another update and with the base (Hu et al.
2021, arXiv 2106.09685, section 7).

    phi(i, j)       |U_a[:, :i]^T U_b[:, :j]|^2 / min(i, j): 1 if the smaller subspace lies in the
                    larger one, 0 if they are orthogonal
    projection      |U^T W0 V|: the size of the base in the update's own directions
    amplification   |dW| / |U^T W0 V|
    strength        |W0 V S|^2 in / (|W0| |S|)^2 for the input directions, |S U^T W0|^2 out /
                    (|W0| |S|)^2 for the output directions: the energy of W0 along the update's
                    directions, weighted by the update's own, relative to random directions; below 1
                    the update changes weak directions of the base

|.| is the Frobenius norm. Unrelated subspaces of a space of dimension n have phi = max(i, j) / n on
average, and random directions have the projection r |W0| / sqrt(out in). The paper takes phi of the
directions of the factor A; here it is that of dW on both sides, which does not depend on how a
method parametrizes dW.

The update in the spectrum of the base: which of the base's singular directions it changes, and
which directions it adds. This takes the SVD of every W0, which is kept in the cache under
the digest of W0 itself.

    W0 = sum_j s0_j u0_j v0_j^T
    position      p_j = sum_i s_i^2 (u_i . u0_j)^2 / sum_i s_i^2, and the same with v: how the
                  update's energy is distributed over W0's directions
    intruders     those of the top 10 left singular vectors of W0 + dW with |cos| < 0.5 to every
                  u0_j

Positions follow Hu et al. 2021, arXiv 2106.09685, section 7.3, which finds that an update amplifies
directions that W0 does not emphasize. Intruder dimensions: Shuttleworth et al. 2024, arXiv
2410.21228.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import chain, count, pairwise
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorafold.files.atomic import atomic_directory, verify
from lorafold.files.cache import cache_directory
from lorafold.identity import of_code
from lorafold.inspecting.updates import Svd, of_dense

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


def phi(a: Tensor, b: Tensor) -> Tensor:  # (n, i), (n, j), orthonormal columns -> (i, j)
    """phi of the first 1, 2, ... columns of both: entry [i, j] is for i + 1 and j + 1 columns."""
    overlap = (a.t() @ b).double().square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in overlap.shape)
    return overlap / torch.minimum(i[:, None], j)


def against_base(svd: Svd, w: Tensor, directions: int | None = None) -> dict[str, float | None]:
    """The figures of one site against its base weight, by their names in the JSON. A ratio is None
    where the update or the base is zero.

    Args:
        svd: The SVD of the update.
        w: W0, (out, in).
        directions: Projection and amplification take so many of the strongest directions, or all
            for None. All directions of a square matrix would be the whole space.
    """
    top, own = (
        svd.top(len(svd.s) if directions is None else directions),
        torch.linalg.vector_norm(w),
    )
    size, r = torch.linalg.vector_norm(svd.s), len(top.s)
    out, inn = w.shape
    read, written = w @ svd.v, svd.u.t() @ w
    projection = torch.linalg.vector_norm(top.u.t() @ read[:, :r])
    return {
        "norm": float(size),
        "base_norm": float(own),
        "relative_norm": _ratio(size, own),
        "projection": float(projection),
        "random_projection": r * float(own) / math.sqrt(out * inn),
        "amplification": _ratio(torch.linalg.vector_norm(top.s), projection) if r else None,
        "strength_read": _ratio(
            torch.linalg.vector_norm(read * svd.s).square() * inn, (own * size).square()
        ),
        "strength_written": _ratio(
            torch.linalg.vector_norm(svd.s[:, None] * written).square() * out, (own * size).square()
        ),
    }


def _ratio(a: Tensor, b: Tensor) -> float | None:
    return float(a / b) if b > 0 else None


BINS = 10
TOP, COSINE = 10, 0.5
FILE = "svd.safetensors"
DIGITS = 32
CODE = ("inspecting/spectra", "inspecting/updates")  # that decomposes W0


def cached_svd(w: Tensor) -> Svd:
    """The SVD of a weight of the base, from the cache, or computed and added to it. Vectors are
    stored in fp16, whose rounding is far below the cosines that are measured.

    Args:
        w: W0, (out, in), in fp32.
    """
    found = sha256(f"{tuple(w.shape)} {w.dtype}\n".encode())
    found.update(w.flatten().numpy().data)
    made_by = cache_directory() / "svd" / of_code(*CODE)[:DIGITS]
    directory = made_by / found.hexdigest()[:DIGITS]
    if not verify(directory):
        return Svd(**{name: tensor.float() for name, tensor in load_file(directory / FILE).items()})
    svd = of_dense(w)
    with atomic_directory(directory, overwrite=True) as tmp:
        save_file(
            {"u": svd.u.half().contiguous(), "s": svd.s, "v": svd.v.half().contiguous()}, tmp / FILE
        )
    return svd


def position(vectors: Tensor, s: Tensor, base: Tensor) -> Tensor:  # (m,)
    """p_j: the share of the update's energy on each of W0's directions. The rest, up to a sum of 1,
    is on directions where W0 is zero.

    Args:
        vectors: Singular vectors of the update, (n, k).
        s: Its singular values, (k,).
        base: Singular vectors of W0 on the same side, (n, m).
    """
    along = (base.t() @ vectors).square() @ s.square()
    return along / s.square().sum()


def binned(p: Tensor, bins: int = BINS) -> list[float]:  # (m,)
    """The share of the energy on each tenth of W0's directions, the strongest tenth first, and as
    the last entry the share outside all of them.
    """
    edges = [round(i * len(p) / bins) for i in range(bins + 1)]
    return [float(p[a:b].sum()) for a, b in pairwise(edges)] + [max(0.0, 1 - float(p.sum()))]


def intruders(base: Svd, w: Tensor, update: Svd) -> int:
    """The number of intruder dimensions: top singular vectors of w + dW that are like none of w.

    Args:
        base: The SVD of w.
        w: W0, (out, in).
        update: The SVD of dW.
    """
    tuned = of_dense(w + update.dense()).top(TOP)
    return int(((base.u.t() @ tuned.u).abs().amax(0) < COSINE).sum())


def in_base_spectrum(w: Tensor, update: Svd, directions: int) -> dict[str, Any]:
    """The figures of one site, by their names in the JSON.

    Args:
        w: W0, (out, in), in fp32.
        update: The SVD of dW.
        directions: `top_projection` is the norm of W0 in so many of its own top directions.
    """
    base = cached_svd(w)
    if not len(update.s):
        return {"intruders": 0}
    writes, reads = position(update.u, update.s, base.u), position(update.v, update.s, base.v)
    return {
        "intruders": intruders(base, w, update),
        "position_written": binned(writes), "position_read": binned(reads),
        "top_projection": float(base.s[:directions].norm()),
    }  # fmt: skip
