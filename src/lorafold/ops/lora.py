"""A linear under a low-rank change with one rounding, forward and backward.

    u  = drop(x) A^T                         (T, r)
    y  = addmm(u (k B)^T, x, W^T)           the GEMM starts from the small product in its fp32
                                            accumulator and rounds once
    gx = addmm(drop((g k B) A), g, W)       the mirror image, with the same places emptied

W (out, in) is frozen, A = down (r, in), B = up (out, r) with every scale in it, drop sets places of
(T, in) to 0 and k = 1 / (1 - p). Only drop(x), u, those places and the small factors are kept for
the backward; W is read again (`frozen.Read`). The specification is `reference.low_rank_linear`;
over any other layer it is `Layer.low_rank`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorafold.ops.arithmetic import arithmetic
from lorafold.ops.dropout import Dropped, empty_
from lorafold.ops.frozen import Read


class _LowRankLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        read: Read,
        down: Tensor,
        up: Tensor,
        xd: Tensor,
        where: Tensor | None,
        scale: float,
    ) -> Tensor:
        dtype = arithmetic(x)
        a, b = down.to(dtype), (up * scale).to(dtype)
        wide = x.to(dtype)
        u = (wide if where is None else xd.to(dtype)) @ a.t()
        ctx.save_for_backward(xd, u, a, b, where)
        ctx.read, ctx.scale, ctx.dtype = read, scale, down.dtype
        return (u @ b.t()).addmm_(wide, read(dtype).t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        xd, u, a, b, where = ctx.saved_tensors
        need_x, _, need_down, need_up, *_ = ctx.needs_input_grad
        wide = g.to(u.dtype)
        v = wide @ b
        gx = gdown = gup = None
        if need_x:
            gx = v @ a
            gx = (
                (gx if where is None else empty_(gx, where))
                .addmm_(wide, ctx.read(wide.dtype))
                .to(g.dtype)
            )
        if need_down:
            gdown = (v.t() @ xd.to(v.dtype)).to(ctx.dtype)
        if need_up:
            # a product with r rows runs faster than one with r columns
            gup = (u.t() @ wide).t().to(ctx.dtype).mul_(ctx.scale)
        return gx, None, gdown, gup, None, None, None


def low_rank_linear(
    x: Tensor, read: Read, down: Tensor, up: Tensor, drop: Dropped | None = None, scale: float = 1.0
) -> Tensor:
    """x (..., in), a frozen W (out, in) to be read, down (r, in), up (out, r), times scale -> (...,
    out) in x's dtype.

    drop: what the branch sees of x, in its place.
    """
    xd, where = (x.detach(), None) if drop is None else (drop.x, drop.where)
    rows, branch = (z.reshape(-1, z.shape[-1]) for z in (x, xd))
    y: Tensor = _LowRankLinear.apply(rows, read, down, up, branch, where, scale)
    return y.view(*x.shape[:-1], len(up))
