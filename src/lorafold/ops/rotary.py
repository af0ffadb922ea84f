"""Rotary position embedding that makes no rotated copy of its input.

    y = x cos + rotate(x) sin,   rotate([a, b]) = [-b, a]

Su et al. 2021, arXiv 2104.09864, in the layout of transformers. x (..., T, D) with halves a and b
(..., T, D / 2); cos and sin broadcast to x. The backward is the transposed map, for which only cos
and sin are kept. The specification is `reference.rotary`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (a, b), (sin_a, sin_b) = x.chunk(2, -1), sin.chunk(2, -1)
        y = torch.mul(x, cos)
        ya, yb = y.chunk(2, -1)
        ya.addcmul_(b, sin_a, value=-1)
        yb.addcmul_(a, sin_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (ga, gb), (sin_a, sin_b) = gy.chunk(2, -1), sin.chunk(2, -1)
        gx = torch.mul(gy, cos)
        ha, hb = gx.chunk(2, -1)
        ha.addcmul_(gb, sin_b)
        hb.addcmul_(ga, sin_a, value=-1)
        return gx, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate(x) sin, in x's shape, dtype and layout. Differentiable once, in x.

    Args:
        x: the input (..., T, D), with D even.
        cos, sin: constants that broadcast to x.
    """
    return _Rotary.apply(x, cos, sin)
