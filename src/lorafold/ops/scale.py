"""A gain on every feature and a sum, in fp32, rounded once.

    z = g * y + c + onto            y, onto (..., k); g, c (k,) fp32

In bf16 the sum is rounded with a dither (`core.rounding`): rounded to the nearest, a gain below 1 +
2^-9 would have no effect, because y is already bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.core.layer import add
from lorafold.core.rounding import dithered, rounded
from lorafold.ops.autocast import Exact
from lorafold.ops.operators import operator

# elements in fp32 at a time; with smaller blocks, the overhead of calls exceeds the gain by caches
BLOCK = 1 << 21


def scaled(y: Tensor, g: Tensor, c: Tensor | None, onto: Tensor | None) -> Tensor:
    """g * y + c + onto (..., k) in plain torch, the specification of `scale`. y (..., k); g (k,); c
    (k,) or None.
    """
    return rounded(add(add(g * y, c), onto), y.dtype)


def _dithered(y: Tensor, g: Tensor, c: Tensor | None, onto: Tensor | None) -> Tensor:
    rows = y.flatten(0, -2)
    gains, *added = (
        t if t.dim() == 1 else t.expand_as(y).flatten(0, -2) for t in (g, c, onto) if t is not None
    )
    parts = []
    step = max(1, BLOCK // y.shape[-1])
    for i in range(0, max(len(rows), 1), step):
        gain, *more = (t if t.dim() == 1 else t[i : i + step] for t in (gains, *added))
        part = torch.mul(rows[i : i + step], gain)  # in fp32, the dtype of g
        for t in more:
            part.add_(t)
        parts.append(dithered(part))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)


def _gradients(z: Tensor, y: Tensor, g: Tensor, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    gy = torch.mul(z, g, out=torch.empty_like(z))  # in fp32, the dtype of g
    gg = (z * y).flatten(0, -2).sum(0, dtype=g.dtype)
    return gy, gg, z.flatten(0, -2).sum(0, dtype=g.dtype) if offset else g.new_empty(0)


# y in bf16, g and c in fp32
SCALE = operator(
    "scale(Tensor y, Tensor g, Tensor? c, Tensor? onto) -> Tensor",
    _dithered,
    lambda y, g, c, onto: y.new_empty(y.shape),
)
BACKWARD = operator(
    "scale_backward(Tensor z, Tensor y, Tensor g, bool offset) -> (Tensor, Tensor, Tensor)",
    _gradients,
    lambda z, y, g, offset: (
        z.new_empty(z.shape),
        torch.empty_like(g),
        torch.empty_like(g) if offset else g.new_empty(0),
    ),
)


class _Scale(Exact):
    @staticmethod
    def forward(ctx: Any, y: Tensor, g: Tensor, c: Tensor | None, onto: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, g)
        ctx.onto = onto
        ctx.c_dtype = None if c is None else c.dtype
        return SCALE(y, g, c, onto)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, z: Tensor) -> Any:
        _, _, need_c, need_onto = ctx.needs_input_grad
        gy, gg, gc = BACKWARD(z, *ctx.saved_tensors, need_c)
        gonto = z.sum_to_size(ctx.onto.shape).to(ctx.onto.dtype) if need_onto else None
        return gy, gg, gc.to(ctx.c_dtype) if need_c else None, gonto


def scale(y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
    """g * y + c + onto (..., k), in y's dtype. Differentiable once in bf16. y (..., k); g (k,); c
    (k,) or None.
    """
    dithers = y.dtype is torch.bfloat16 and g.dtype is torch.float32
    fused = dithers and not torch.compiler.is_compiling()
    return _Scale.apply(y, g, c, onto) if fused else scaled(y, g, c, onto)
