"""Where an update lies: against another update, and against the base (Hu et al. 2021, arXiv
2106.09685, section 7).

    phi(i, j)       |U_a[:, :i]^T U_b[:, :j]|^2 / min(i, j)     1: the smaller subspace lies in the
                                                                larger, 0: they are orthogonal
    projection      |U^T W0 V|                                  how strong the base is in the
                                                                update's own directions
    amplification   |dW| / |U^T W0 V|
    strength        |W0 V S|^2 in / (|W0| |S|)^2 for what is read, |S U^T W0|^2 out / (|W0| |S|)^2
                    for what is written: the energy of W0
                    along the update's directions, weighted by its own, over that along random ones;
                    below 1 they are weak directions

|.| is the Frobenius norm. Subspaces without relation have phi = max(i, j) / n on average, n their
dimension, and random directions the projection r |W0| / sqrt(out in). The paper takes phi of the
factor A's directions; here it is of dW's own, on both sides: what a method's parameters are does
not matter then.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorafold.inspecting.updates import Svd


def phi(a: Tensor, b: Tensor) -> Tensor:  # (n, i), (n, j), orthonormal columns -> (i, j)
    overlap = (a.t() @ b).double().square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, dtype=torch.float64) for n in overlap.shape)
    return overlap / torch.minimum(i[:, None], j)


def against_base(svd: Svd, w: Tensor, directions: int | None = None) -> dict[str, float | None]:
    """The figures of one site against its own base weight w (out, in), by their names in the JSON;
    None where the update is zero.

    Projection and amplification are of so many directions, the strongest (None: all): all of a
    square matrix would say nothing.
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
