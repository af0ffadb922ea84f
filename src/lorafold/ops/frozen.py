"""A frozen linear whose matrix is read anew for the backward, instead of being kept from the forward.

    y  = addmm(onto, x, W^T)        x (T, in), W (out, in), onto (T, out): one sum in the GEMM's fp32 accumulator, rounded once
    gx = g W,  gonto = g

`read` gives W in a dtype. A matrix that is stored as it is costs nothing to read; one that is stored in other numbers (NF4, int8) is
unpacked once a use, so that a step never holds more than one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Read = Callable[[torch.dtype], Tensor]  # dtype -> W (out, in)


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, read: Read) -> Tensor:
        ctx.read, ctx.onto_dtype = read, None if onto is None else onto.dtype
        w = read(x.dtype)
        return x @ w.t() if onto is None else torch.addmm(onto.to(w.dtype), x, w.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_x, need_onto, _ = ctx.needs_input_grad
        return g @ ctx.read(g.dtype) if need_x else None, g.to(ctx.onto_dtype) if need_onto else None, None


def frozen_linear(x: Tensor, onto: Tensor | None, read: Read) -> Tensor:
    """x (T, in), onto (T, out) or None -> (T, out) in x's dtype."""
    return _FrozenLinear.apply(x, onto, read)
