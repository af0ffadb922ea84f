"""A frozen linear with values added at some entries of its matrix.

    y  = x W'^T                         x (T, in), W' (out, in) = W + values at `at` (k,)
    gx = g W',  gvalues[e] = sum_t g[t, i_e] x[t, j_e]      (i_e, j_e) the row and column of entry e

The gradient of few entries is computed at these alone, from rows of the transposed g and x, and
never as a matrix. W' is built again in the backward (`core.scatter_add`), so a step never holds
more than one; x, the values and their places are kept. LT-SFT and FISH mask use it.

1024 x 576 times 576 x 1536 in bf16, one CPU thread, k = 0.5% of the entries: their gradient takes
5.0 ms, the whole matrix of gradients 10.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.core.scatter_add import scatter_added
from lorafold.ops.arithmetic import arithmetic
from lorafold.ops.autocast import Exact
from lorafold.ops.frozen import Read

# at most one entry of so many: above, a whole product is faster
FEW = 128
# numbers of g and of x that are gathered at a time, which fit in a processor's cache
BLOCK = 1 << 18


class _SparseLinear(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Read, values: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, at)
        ctx.read, ctx.dtype = read, arithmetic(x)
        w = scatter_added(read(x.dtype), values, at).to(ctx.dtype)
        return (x.to(ctx.dtype) @ w.t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, values, at = ctx.saved_tensors
        need_x, _, need_values, _ = ctx.needs_input_grad
        gx = None
        if need_x:
            w = scatter_added(ctx.read(x.dtype), values, at).to(ctx.dtype)
            gx = (g.to(ctx.dtype) @ w).to(g.dtype)
        return gx, None, product_at(g, x, at).to(values.dtype) if need_values else None, None


def product_at(g: Tensor, x: Tensor, at: Tensor) -> Tensor:
    """The entries (k,) of g^T x (out, in), in fp32 or wider where they are few. g (T, out); x (T,
    in); at (k,).
    """
    dtype = arithmetic(x)
    if g.device.type != "cpu" or FEW * len(at) > g.shape[1] * x.shape[1]:
        return (g.to(dtype).t() @ x.to(dtype)).flatten()[at]
    columns, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    gt, xt = g.t().contiguous(), x.t().contiguous()
    sums = []
    for part in at.split(max(1, BLOCK // len(x))):
        pairs = gt.index_select(0, part // columns) * xt.index_select(0, part % columns)
        sums.append(pairs.sum(-1, dtype=wide))
    return torch.cat(sums)


def sparse_linear(x: Tensor, read: Read, values: Tensor, at: Tensor) -> Tensor:
    """x W'^T (..., out), in x's dtype. Differentiable once. x (..., in); values (k,); at (k,)."""
    return _SparseLinear.over_rows(x, read, values, at)
