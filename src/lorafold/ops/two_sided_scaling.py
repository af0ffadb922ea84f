"""A product with a frozen matrix whose rows and columns have trained gains.

    y = u (diag(b) M diag(d))^T         u (T, r), M (out, r) frozen, b (out,), d (r,)
    gu = g (diag(b) M diag(d)),  H = g^T u * M,  gb = H d,  gd = b H

The gains are multiplied into M in fp32, which is rounded once, since M is smaller than u and y. One
product H (out, r) gives the gradients of both. Only u, b and d are kept for the backward: autograd
would keep the scaled matrix as well. VeRA uses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.ops.arithmetic import arithmetic
from lorafold.ops.autocast import Exact


class _ScaledProduct(Exact):
    @staticmethod
    def forward(ctx: Any, u: Tensor, m: Tensor, b: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(u, m, b, d)
        ctx.dtype = dtype = arithmetic(u)
        return (u.to(dtype) @ scaled_matrix(m, b, d).to(dtype).t()).to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        u, m, b, d = ctx.saved_tensors
        need_u, _, need_b, need_d = ctx.needs_input_grad
        wide = g.to(ctx.dtype)
        gu = (wide @ scaled_matrix(m, b, d).to(ctx.dtype)).to(u.dtype) if need_u else None
        if not (need_b or need_d):
            return gu, None, None, None
        # (r, T) x (T, out) runs faster than (out, T) x (T, r)
        h = (u.to(ctx.dtype).t() @ wide).t().to(m.dtype).mul_(m)
        return gu, None, h @ d, b @ h


def scaled_matrix(m: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """diag(b) m diag(d), (..., out, r). m (out, r); b (..., out); d (..., r)."""
    return (b[..., None] * m).mul_(d[..., None, :])


def scaled_product(u: Tensor, m: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """u (diag(b) m diag(d))^T, (..., out), in u's dtype. Differentiable once. u (..., r); m (out,
    r); b (out,); d (r,).
    """
    if torch.compiler.is_compiling():
        return u @ (b[:, None] * m * d).to(u.dtype).t()
    return _ScaledProduct.over_rows(u, m, b, d)
