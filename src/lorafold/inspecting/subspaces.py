"""The subspaces of an update compared with those of another update and with the base (Hu et al.
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
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorafold.inspecting.updates import Svd


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
