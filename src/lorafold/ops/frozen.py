"""Linear layers that read a frozen matrix again in the backward pass instead of saving it, and
trained updates on them.

    y  = addmm(residual, x, W^T)    x (T, in), W (out, in), residual (T, out) or (out,): one sum in
    gx = g W,  gresidual = g        the GEMM's fp32 accumulator, rounded once

`read` returns W in a dtype. A quantized W is dequantized for each use, so that a step never holds
more than one dequantized matrix.

    u  = drop(x) A^T                        a low-rank update: A = down (r, in), B = up (out, r),
    y  = addmm(u (k B)^T, x, W^T)           rounded once in the forward and in the backward
    gx = addmm(drop((g k B) A), g, W)       the same elements of (T, in) dropped in both

k is the update's scale times 1 / (1 - p).

    y  = x W'^T                             W' = W + values (k,) at places `at` (LT-SFT, FISH mask)
    gx = g W',  gvalues[e] = sum_t g[t, i_e] x[t, j_e]      (i_e, j_e) row and column of entry e

    y = u (diag(b) M diag(d))^T             M (out, r) frozen, gains b (out,) and d (r,) (VeRA)
    gu = g (diag(b) M diag(d)),  H = g^T u * M,  gb = H d,  gd = b H

The gains are multiplied into M in fp32, and the product is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lorafold.core.rounding import scatter_added
from lorafold.ops.arithmetic import matmul, matmul_dtype, scaled_as, transposed_matmul
from lorafold.ops.autocast import Exact, at_least_fp32
from lorafold.ops.dropout import EMPTY, Dropped

Read = Callable[[torch.dtype], Tensor]  # dtype -> W (out, in)


class _FrozenLinear(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, read: Read) -> Tensor:
        ctx.read, ctx.dtype = read, (dtype := matmul_dtype(x))
        ctx.residual = None if residual is None else (residual.shape, residual.dtype)
        wide, w = x.to(dtype), read(dtype)
        y = wide @ w.t() if residual is None else torch.addmm(residual.to(dtype), wide, w.t())
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        need_x, need_residual, _ = ctx.needs_input_grad
        gx = (g.to(ctx.dtype) @ ctx.read(ctx.dtype)).to(g.dtype) if need_x else None
        if not need_residual:
            return gx, None, None
        shape, dtype = ctx.residual
        return gx, g.sum_to_size(shape).to(dtype), None


# x W^T + residual (T, out), in x's dtype, for x (T, in) and residual (T, out), (out,) or None;
# `Read` returns W (out, in)
frozen_linear: Callable[[Tensor, Tensor | None, Read], Tensor] = _FrozenLinear.apply


def low_rank_parts(
    x: Tensor, down: Tensor, up: Tensor, drop: Dropped | None, k: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, float]:
    """Returns x (T, in), `down` (..., r, in) and scale * `up` (..., out, r) in the dtype of their
    matmuls; x with dropped elements set to 0; their positions, or None; and the scale, which is k
    times the scale of the dropout.
    """
    dtype, xd, where, scale = matmul_dtype(x), x, None, k
    if drop is not None:
        xd, where, scale = drop.x.reshape(x.shape), drop.where, drop.scale * k
    return x.to(dtype), scaled_as(down, 1.0, dtype), scaled_as(up, scale, dtype), xd, where, scale


class _LowRankLinear(Exact):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Read, down: Tensor, up: Tensor, drop: Dropped | None, k: float
    ) -> Tensor:
        wide, a, b, xd, where, scale = low_rank_parts(x, down, up, drop, k)
        u = (wide if where is None else xd.to(wide.dtype)) @ a.t()
        ctx.save_for_backward(xd, u, a, b, where)
        ctx.read, ctx.scale, ctx.down, ctx.up = read, scale, down.dtype, up.dtype
        return (u @ b.t()).addmm_(wide, read(wide.dtype).t()).to(x.dtype)

    @staticmethod
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
            gdown = matmul(v.t(), xd.to(v.dtype), ctx.down)
        if need_up:
            gup = transposed_matmul(u.t(), wide, ctx.up, ctx.scale)
        return gx, None, gdown, gup, None, None


# x W^T + k drop(x) down^T up^T (..., out), in x's dtype, for x (..., in), down (r, in) and
# up (out, r)
low_rank_linear: Callable[[Tensor, Read, Tensor, Tensor, Dropped | None, float], Tensor] = (
    _LowRankLinear.over_rows
)


# if more than 1 in FEW entries is needed, the whole matmul is faster
FEW = 128
# elements of g and of x that are gathered at a time, so that they fit in a processor's cache
BLOCK = 1 << 18


class _SparseLinear(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Read, values: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, at)
        ctx.read, ctx.dtype = read, matmul_dtype(x)
        w = scatter_added(read(x.dtype), values, at).to(ctx.dtype)
        return (x.to(ctx.dtype) @ w.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, values, at = ctx.saved_tensors
        need_x, _, need_values, _ = ctx.needs_input_grad
        gx = None
        if need_x:
            w = scatter_added(ctx.read(x.dtype), values, at).to(ctx.dtype)
            gx = (g.to(ctx.dtype) @ w).to(g.dtype)
        return gx, None, product_at(g, x, at).to(values.dtype) if need_values else None, None


def product_at(g: Tensor, x: Tensor, at: Tensor) -> Tensor:
    """Returns the entries (k,) of g^T x at the flat indices `at` (k,), for g (T, out) and x (T,
    in). On a CPU, a few entries are summed in fp32 or wider.
    """
    dtype = matmul_dtype(x)
    if g.device.type != "cpu" or FEW * len(at) > g.shape[1] * x.shape[1]:
        return (g.to(dtype).t() @ x.to(dtype)).flatten()[at]
    columns, wide = x.shape[1], at_least_fp32(x)
    gt, xt = g.t().contiguous(), x.t().contiguous()
    sums = []
    for part in at.split(max(1, BLOCK // len(x))):
        pairs = gt.index_select(0, part // columns) * xt.index_select(0, part % columns)
        sums.append(pairs.sum(-1, dtype=wide))
    return torch.cat(sums)


# x W'^T (..., out), in x's dtype, for x (..., in), values (k,) and at (k,)
sparse_linear: Callable[[Tensor, Read, Tensor, Tensor], Tensor] = _SparseLinear.over_rows


class _ScaledProduct(Exact):
    @staticmethod
    def forward(ctx: Any, u: Tensor, m: Tensor, b: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(u, m, b, d)
        ctx.dtype = dtype = matmul_dtype(u)
        return (u.to(dtype) @ scaled_matrix(m, b, d).to(dtype).t()).to(u.dtype)

    @staticmethod
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
    """Returns diag(b) m diag(d), (..., out, r), for m (out, r), b (..., out), d (..., r)."""
    return (b[..., None] * m).mul_(d[..., None, :])


def scaled_product(u: Tensor, m: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """Returns u (diag(b) m diag(d))^T, (..., out), in u's dtype, for u (..., r), a frozen m (out,
    r), b (out,), d (r,).
    """
    if torch.compiler.is_compiling():
        return u @ (b[:, None] * m * d).to(u.dtype).t()
    return _ScaledProduct.over_rows(u, m, b, d)
