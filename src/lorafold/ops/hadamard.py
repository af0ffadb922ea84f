"""The elementwise (Hadamard) product of two low-rank matrices, of which only the factors are saved
for the backward pass.

    P = s (A1 B1) * (A2 B2)         A (..., out, r), B (..., r, in)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lorafold.ops.autocast import Exact


class _Hadamard(Exact):
    @staticmethod
    def forward(ctx: Any, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(a1, b1, a2, b2)
        ctx.s = s
        return (a1 @ b1).mul_(a2 @ b2).mul_(s)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a1, b1, a2, b2 = ctx.saved_tensors
        g1 = (a2 @ b2).mul_(g).mul_(ctx.s)
        g2 = (a1 @ b1).mul_(g).mul_(ctx.s)
        return g1 @ b1.mT, a1.mT @ g1, g2 @ b2.mT, a2.mT @ g2, None


# (a1, b1, a2, b2, s) -> s (a1 b1) * (a2 b2), (..., out, in)
hadamard: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] = _Hadamard.apply
