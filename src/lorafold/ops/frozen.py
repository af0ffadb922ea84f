"""A frozen linear whose matrix is read again in the backward, instead of being kept from the
forward; and the same plus a low-rank update, with one rounding in the forward and in the backward.

    y  = addmm(onto, x, W^T)        x (T, in), W (out, in), onto (T, out) or (out,): one sum in the
                                    GEMM's fp32 accumulator, rounded once
    gx = g W,  gonto = g

`read` gives W in a dtype. A matrix stored in floating point costs nothing to read; a quantized one
(NF4, int8) is dequantized for each use, so that a step never holds more than one of them.

    u  = drop(x) A^T                         (T, r)
    y  = addmm(u (k B)^T, x, W^T)           the GEMM starts from the small product in its fp32
                                            accumulator and rounds once
    gx = addmm(drop((g k B) A), g, W)       the same in the backward, with the same elements dropped

A = down (r, in), B = up (out, r), drop sets elements of (T, in) to 0, and k is the update's scale
times 1 / (1 - p). Only drop(x), u, the indices of the dropped elements and the small factors are
kept. The specification is `reference.low_rank_linear`; for any other layer `Layer.low_rank` does
the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.ops.arithmetic import arithmetic, narrowed, product, transposed_product
from lorafold.ops.autocast import Exact
from lorafold.ops.dropout import EMPTY, Dropped

Read = Callable[[torch.dtype], Tensor]  # dtype -> W (out, in)


class _FrozenLinear(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, read: Read) -> Tensor:
        ctx.read, ctx.onto = read, None if onto is None else (onto.shape, onto.dtype)
        ctx.dtype = dtype = arithmetic(x)
        wide, w = x.to(dtype), read(dtype)
        y = wide @ w.t() if onto is None else torch.addmm(onto.to(dtype), wide, w.t())
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        need_x, need_onto, _ = ctx.needs_input_grad
        gx = (g.to(ctx.dtype) @ ctx.read(ctx.dtype)).to(g.dtype) if need_x else None
        if not need_onto:
            return gx, None, None
        shape, dtype = ctx.onto
        return gx, g.sum_to_size(shape).to(dtype), None


# x W^T + onto (T, out), in x's dtype, of x (T, in) and onto (T, out), (out,) or None; `Read` reads
# W (out, in). Differentiable once.
frozen_linear: Callable[[Tensor, Tensor | None, Read], Tensor] = _FrozenLinear.apply


class _LowRankLinear(Exact):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Read, down: Tensor, up: Tensor, drop: Dropped | None, k: float
    ) -> Tensor:
        dtype = arithmetic(x)
        xd, where, scale = x, None, k
        if drop is not None:
            xd, where, scale = drop.x.reshape(x.shape), drop.where, drop.scale * k
        a, b = narrowed(down, 1.0, dtype), narrowed(up, scale, dtype)
        wide = x.to(dtype)
        u = (wide if where is None else xd.to(dtype)) @ a.t()
        ctx.save_for_backward(xd, u, a, b, where)
        ctx.read, ctx.scale, ctx.down, ctx.up = read, scale, down.dtype, up.dtype
        return (u @ b.t()).addmm_(wide, read(dtype).t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        xd, u, a, b, where = ctx.saved_tensors
        need_x, _, need_down, need_up, _, _ = ctx.needs_input_grad
        wide = g.to(u.dtype)
        v = wide @ b
        gx = gdown = gup = None
        if need_x:
            gx = v @ a
            if where is not None:
                EMPTY(gx, where)
            gx = gx.addmm_(wide, ctx.read(wide.dtype)).to(g.dtype)
        if need_down:
            gdown = product(v.t(), xd.to(v.dtype), ctx.down)
        if need_up:
            gup = transposed_product(u.t(), wide, ctx.up, ctx.scale)
        return gx, None, gdown, gup, None, None


def low_rank_linear(
    x: Tensor, read: Read, down: Tensor, up: Tensor, drop: Dropped | None = None, k: float = 1.0
) -> Tensor:
    """x W^T + k drop(x) down^T up^T (..., out), in x's dtype. Differentiable once. x (..., in);
    down (r, in); up (out, r).
    """
    return _LowRankLinear.over_rows(x, read, down, up, drop, k)
