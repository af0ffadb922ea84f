"""Multiplies features by gains and adds offsets and a residual, in fp32, rounded once.

    z = g * y + c + residual        y, residual (..., k); g, c (k,) fp32

In bf16 the sum is rounded with a dither (`core.rounding`): rounded to the nearest, a gain below 1 +
2^-9 would have no effect, because y is already bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafold.core.layer import add
from lorafold.core.rounding import dithered, rounded
from lorafold.ops.autocast import Exact
from lorafold.ops.operators import operator

# elements in fp32 at a time; smaller blocks would fit in caches, but their calls cost more
BLOCK = 1 << 21


def plain_scale_and_add(y: Tensor, g: Tensor, c: Tensor | None, residual: Tensor | None) -> Tensor:
    """Returns g * y + c + residual (..., k) in plain torch, the reference for `scale_and_add`, for
    y (..., k), g (k,), c (k,) or None.
    """
    return rounded(add(add(g * y, c), residual), y.dtype)


def _dithered(y: Tensor, g: Tensor, c: Tensor | None, residual: Tensor | None) -> Tensor:
    rows = y.flatten(0, -2)
    terms = (t for t in (g, c, residual) if t is not None)
    gains, *added = (t if t.dim() == 1 else t.expand_as(y).flatten(0, -2) for t in terms)
    parts = []
    step = max(1, BLOCK // y.shape[-1])
    for i in range(0, max(len(rows), 1), step):
        gain, *more = (t if t.dim() == 1 else t[i : i + step] for t in (gains, *added))
        part = torch.mul(rows[i : i + step], gain)  # in fp32, the dtype of g
        for t in more:
            part.add_(t)
        parts.append(dithered(part))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)


def _gradients(grad: Tensor, y: Tensor, g: Tensor, has_c: bool) -> tuple[Tensor, Tensor, Tensor]:
    gy = torch.mul(grad, g, out=torch.empty_like(grad))  # in fp32, the dtype of g
    gg = (grad * y).flatten(0, -2).sum(0, dtype=g.dtype)
    return gy, gg, grad.flatten(0, -2).sum(0, dtype=g.dtype) if has_c else g.new_empty(0)


# y in bf16, g and c in fp32
SCALE = operator(
    "scale(Tensor y, Tensor g, Tensor? c, Tensor? residual) -> Tensor",
    _dithered,
    lambda y, g, c, residual: y.new_empty(y.shape),
)
BACKWARD = operator(
    "scale_backward(Tensor grad, Tensor y, Tensor g, bool has_c) -> (Tensor, Tensor, Tensor)",
    _gradients,
    lambda grad, y, g, has_c: (
        grad.new_empty(grad.shape),
        torch.empty_like(g),
        torch.empty_like(g) if has_c else g.new_empty(0),
    ),
)


class _ScaleAndAdd(Exact):
    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor, c: Tensor | None, residual: Tensor | None) -> Any:
        ctx.save_for_backward(y, g)
        ctx.residual, ctx.c_dtype = residual, None if c is None else c.dtype
        return SCALE(y, g, c, residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, _, need_c, need_residual = ctx.needs_input_grad
        gy, gg, gc = BACKWARD(grad, *ctx.saved_tensors, need_c)
        gc = gc.to(ctx.c_dtype) if need_c else None
        if not need_residual:
            return gy, gg, gc, None
        return gy, gg, gc, grad.sum_to_size(ctx.residual.shape).to(ctx.residual.dtype)


def scale_and_add(
    y: Tensor, g: Tensor, c: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Returns g * y + c + residual (..., k), in y's dtype, for y (..., k), g (k,), c (k,) or None.
    """
    dithers = y.dtype is torch.bfloat16 and g.dtype is torch.float32
    fused = dithers and not torch.compiler.is_compiling()
    return (_ScaleAndAdd.apply if fused else plain_scale_and_add)(y, g, c, residual)
