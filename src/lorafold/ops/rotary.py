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
from torch.autograd.function import once_differentiable

from lorafold.ops.autocast import Exact
from lorafold.ops.operators import operator


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    (a, b), (sin_a, sin_b) = x.chunk(2, -1), sin.chunk(2, -1)
    of_b, of_a, sign = (sin_b, sin_a, 1) if back else (sin_a, sin_b, -1)
    y = torch.mul(x, cos)
    ya, yb = y.chunk(2, -1)
    ya.addcmul_(b, of_b, value=sign)
    yb.addcmul_(a, of_a, value=-sign)
    return y


ROTARY = operator(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    _rotated,
    lambda x, cos, sin, back: torch.empty_like(x),
)


class _Rotary(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y: Tensor = ROTARY(x, cos, sin, False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None]:
        return ROTARY(gy, *ctx.saved_tensors, True), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate(x) sin, in x's shape, dtype and layout. Differentiable once, in x.

    Args:
        x: the input (..., T, D), with D even.
        cos, sin: constants that broadcast to x.
    """
    return _Rotary.apply(x, cos, sin)
