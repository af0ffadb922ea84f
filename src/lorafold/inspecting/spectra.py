"""Figures of an update's singular values, and of its directions relative to the base.

    energy            s_i^2 / |dW|^2, |.| the Frobenius norm
    effective rank p  the smallest number of directions that hold the share p of the energy
    stable rank       |dW|^2 / s_1^2            Rudelson and Vershynin 2007, arXiv math/0503442
    entropy rank      exp(-sum p_i log p_i), p_i = s_i / sum s
                                                Roy and Vetterli 2007, "The effective rank"
    phi(i, j)         |U_a[:, :i]^T U_b[:, :j]|^2 / min(i, j): 1 if the smaller subspace lies in the
                      larger one, 0 if they are orthogonal, max(i, j) / n for unrelated ones
    projection        |U^T W0 V|: the norm of the base in the update's directions; it is
                      r |W0| / sqrt(out in) in random directions
    amplification     |dW| / |U^T W0 V|
    strength          |W0 V S|^2 in / (|W0| |S|)^2 for the input directions, |S U^T W0|^2 out /
                      (|W0| |S|)^2 for the output directions; below 1, the update changes weak
                      directions of the base
    position          p_j = sum_i s_i^2 (u_i . u0_j)^2 / sum_i s_i^2, and the same with v: how the
                      update's energy is distributed over W0's singular directions
    intruders         the top 10 left singular vectors of W0 + dW with |cos| < 0.5 to every u0_j;
                      Shuttleworth et al. 2024, arXiv 2410.21228

phi, projection and position: Hu et al. 2021, arXiv 2106.09685, section 7. The paper computes phi
from the factor A; here it is computed from the singular vectors of dW, so it does not depend on how
a method parametrizes dW. Positions and intruders need the SVD of every W0, which is cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import chain, count, pairwise

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorafold.files.atomic import atomic_directory, verify
from lorafold.files.cache import cache_directory
from lorafold.identity import of_code
from lorafold.inspecting.result import BaseFigures, PooledRank, SpectrumPositions
from lorafold.inspecting.updates import Svd, svd_of_dense

ENERGY_SHARE = 0.95


def effective_rank(s: Tensor, share: float) -> int:  # (k,)
    squares = s.double().square()
    # the tolerance is for the rounding of the sum, so that a share of 1 is reached
    below = squares.cumsum(0) / squares.sum() < share * (1 - 1e-12)
    return int(below.sum()) + 1 if len(s) else 0


def stable_rank(s: Tensor) -> float:  # (k,)
    return float(s.double().square().sum() / s[0].double().square()) if len(s) else 0.0


def entropy_rank(s: Tensor) -> float:  # (k,)
    p = s.double() / s.double().sum()
    return float(torch.exp(torch.special.entr(p).sum())) if len(s) else 0.0


def pooled(s: Sequence[Tensor]) -> PooledRank:  # (k,) for each site
    """The rank that keeps 95% of the energy if all modules are truncated to it, and the advised
    rank: 0, 1, 2 or a multiple of 4.
    """
    energies = pad_sequence(list(s), batch_first=True).double().square().sum(0)
    total = float(energies.sum())

    def loss(rank: int) -> float:
        return float(energies[rank:].sum()) / total if total else 0.0

    def enough(ranks: Iterable[int]) -> int:
        return next(rank for rank in ranks if loss(rank) <= 1 - ENERGY_SHARE)

    advised = enough(chain((0, 1, 2), count(4, 4)))
    return PooledRank(enough(count()), advised, loss(advised))


def advice(nominal: int | None, pooled_rank: PooledRank) -> str:
    """A sentence on the rank that the adapter needs; `nominal` is the adapter's rank, or None if
    modules have different ranks.
    """
    if not pooled_rank.rank_95:
        return "the update is zero: training changed nothing"
    enough, advised = pooled_rank.rank_95, pooled_rank.advised_rank
    verdict = f"resizing it to rank {advised} loses {pooled_rank.advised_loss:.1%} of the energy"
    has = (
        ", and the adapter has rank" if nominal is not None else " (the adapter has no single rank)"
    )
    if nominal is not None:
        has += f" {nominal}"
        if advised >= nominal:
            verdict = "use a higher rank if you can" if enough >= nominal else "keep this rank"
    return f"rank {enough} is enough for 95% of the energy{has}: {verdict}"


def phi(a: Tensor, b: Tensor) -> Tensor:  # (n, i), (n, j), orthonormal columns -> (i, j)
    """phi of the leading columns: entry [i, j] is for i + 1 columns of a and j + 1 columns of b."""
    overlap = (a.t() @ b).double().square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in overlap.shape)
    return overlap / torch.minimum(i[:, None], j)


def against_base(svd: Svd, w: Tensor, directions: int | None = None) -> BaseFigures:
    """Figures of an update relative to its base weight w (out, in). Projection and amplification
    use only the strongest directions, because all directions of a square matrix span the whole
    space.
    """
    top = svd.top(len(svd.s) if directions is None else directions)
    size, base_size = map(torch.linalg.vector_norm, (svd.s, w))
    r, (out, inn) = len(top.s), w.shape
    read, written = w @ svd.v, svd.u.t() @ w
    projection = torch.linalg.vector_norm(top.u.t() @ read[:, :r])

    def strength(along: Tensor, n: int) -> float | None:
        return _ratio(torch.linalg.vector_norm(along).square() * n, (base_size * size).square())

    return BaseFigures(
        norm=float(size),
        base_norm=float(base_size),
        relative_norm=_ratio(size, base_size),
        projection=float(projection),
        random_projection=r * float(base_size) / math.sqrt(out * inn),
        amplification=_ratio(torch.linalg.vector_norm(top.s), projection) if r else None,
        strength_read=strength(read * svd.s, inn),
        strength_written=strength(svd.s[:, None] * written, out),
    )


def _ratio(a: Tensor, b: Tensor) -> float | None:
    return float(a / b) if b > 0 else None


BINS = 10
NUM_TOP, MAX_INTRUDER_COSINE = 10, 0.5
FILE = "svd.safetensors"
DIGEST_LENGTH = 32
CODE_FILES = ("inspecting/spectra", "inspecting/updates")  # cached SVDs depend on this code


def cached_svd(w: Tensor) -> Svd:  # (out, in)
    """The SVD of a base weight in fp32, cached on disk with vectors in fp16."""
    digest = sha256(f"{tuple(w.shape)} {w.dtype}\n".encode())
    digest.update(w.flatten().numpy().data)
    made_by = cache_directory() / "svd" / of_code(*CODE_FILES)[:DIGEST_LENGTH]
    directory = made_by / digest.hexdigest()[:DIGEST_LENGTH]
    if not verify(directory):
        return Svd(**{name: tensor.float() for name, tensor in load_file(directory / FILE).items()})
    svd = svd_of_dense(w)
    tensors = {"u": svd.u.half().contiguous(), "s": svd.s, "v": svd.v.half().contiguous()}
    with atomic_directory(directory, overwrite=True) as tmp:
        save_file(tensors, tmp / FILE)
    return svd


def position(vectors: Tensor, s: Tensor, base: Tensor) -> list[float]:  # (n, k), (k,), (n, m)
    """The shares of the update's energy in each tenth of W0's directions, and outside of them."""
    p = (base.t() @ vectors).square() @ s.square() / s.square().sum()
    edges = [round(i * len(p) / BINS) for i in range(BINS + 1)]
    return [float(p[a:b].sum()) for a, b in pairwise(edges)] + [max(0.0, 1 - float(p.sum()))]


def intruders(base: Svd, w: Tensor, update: Svd) -> int:  # w (out, in)
    """The number of intruder dimensions: top left singular vectors of w + dW that are dissimilar to
    all left singular vectors of w.
    """
    tuned = svd_of_dense(w + update.dense()).top(NUM_TOP)
    return int(((base.u.t() @ tuned.u).abs().amax(0) < MAX_INTRUDER_COSINE).sum())


def in_base_spectrum(
    w: Tensor, update: Svd, directions: int
) -> tuple[int, SpectrumPositions | None]:
    """The number of intruder dimensions and the positions of an update, for w (out, in) in fp32."""
    base = cached_svd(w)
    if not len(update.s):
        return 0, None
    written, read = (
        position(x, update.s, basis) for x, basis in ((update.u, base.u), (update.v, base.v))
    )
    positions = SpectrumPositions(written, read, float(base.s[:directions].norm()))
    return intruders(base, w, update), positions
