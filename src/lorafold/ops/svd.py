"""Truncated SVD as two factors of equal norm, and the SVD of a product (Eckart and Young 1936).

    w ~ s B A,   B = U sqrt(S / s) (out, r), A = sqrt(S / s) V^T (r, in),   U S V^T the r largest
                 singular parts of w

With up = Q R and down^T = Q' R', the SVD of a product follows from the SVD of R R'^T, (r, r).
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_of_rank(
    w: Tensor, rank: int, scale: float = 1.0, niter: int = 16
) -> tuple[Tensor, Tensor]:
    """Returns the factors B (..., out, rank) and A (..., rank, in) of the best approximation of w
    (..., out, in). Small ranks use subspace iteration; 16 iterations leave a residual within 5e-5
    of the optimum.
    """
    if niter and 2 * rank < min(w.shape[-2:]):
        u, s, v = torch.svd_lowrank(w, q=2 * rank, niter=niter)
        vt = v.mT
    else:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = (s[..., :rank] / scale).sqrt()
    return u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]


def svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the SVD of up (..., out, r) @ down (..., r, in), in fp64: U (..., out, k), S (..., k)
    descending, V^T (..., k, in), k = min(out, r, in). MPS tensors are moved to the CPU, because MPS
    has no fp64.
    """
    up, down = (x.cpu() if x.device.type == "mps" else x for x in (up, down))
    left, r_up = torch.linalg.qr(up.double())
    right, r_down = torch.linalg.qr(down.double().mT)
    u, s, vt = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return left @ u, s, vt @ right.mT
