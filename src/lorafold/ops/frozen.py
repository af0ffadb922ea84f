"""A frozen linear whose matrix is read again in the backward, instead of being kept from the
forward.

    y  = addmm(onto, x, W^T)        x (T, in), W (out, in), onto (T, out) or (out,): one sum in the
                                    GEMM's fp32 accumulator, rounded once
    gx = g W,  gonto = g

`read` gives W in a dtype. A matrix stored in floating point costs nothing to read; a quantized one
(NF4, int8) is dequantized for each use, so that a step never holds more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.ops.arithmetic import arithmetic
from lorafold.ops.autocast import Exact

Read = Callable[[torch.dtype], Tensor]  # dtype -> W (out, in)


class _FrozenLinear(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, read: Read) -> Tensor:
        ctx.read, ctx.onto = read, None if onto is None else (onto.shape, onto.dtype)
        ctx.dtype = dtype = arithmetic(x)
        wide, w = x.to(dtype), read(dtype)
        return (wide @ w.t() if onto is None else torch.addmm(onto.to(dtype), wide, w.t())).to(
            x.dtype
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_x, need_onto, _ = ctx.needs_input_grad
        gx = (g.to(ctx.dtype) @ ctx.read(ctx.dtype)).to(g.dtype) if need_x else None
        if not need_onto:
            return gx, None, None
        shape, dtype = ctx.onto
        return gx, g.sum_to_size(shape).to(dtype), None


def frozen_linear(x: Tensor, onto: Tensor | None, read: Read) -> Tensor:
    """x W^T + onto (T, out), in x's dtype. Differentiable once.

    Args:
        x: the input (T, in).
        onto: what is added before the rounding, (T, out) or (out,), or None.
        read: returns W (out, in) in a dtype.
    """
    return _FrozenLinear.apply(x, onto, read)
