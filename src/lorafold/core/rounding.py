"""Rounding to bf16 that loses no small change: dithered, by bits of the value itself.

    round(v) = the bf16 value below or above v, above for a share (v - below) / (above - below) of
    values

W + dW and g y are sums and products with something that lies on the bf16 grid already, so rounding
them to the nearest drops every dW and every gain under half a unit. A dither keeps them on average:
its bits are the value's own upper half times an odd constant, so the same value always rounds the
same way (a replayed checkpoint, another place in the batch, decoding and prefill agree), and a
value on the grid stays what it is.

Elements times a gain 1 + e, survival of the change (projection on it) and noise against rounding to
the nearest, 1024 x 1536: e near 1e-4: 1.01 (nearest 0.00), noise 6.7e-4 of |y|; e near 1e-2: 1.00
(nearest 1.00), noise 2.3e-3 (nearest 1.7e-3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ODD = 0x9E37  # near 65536 / golden ratio: consecutive mantissas get dithers that lie far apart


def dithered(v: Tensor) -> Tensor:
    """v fp32 -> bf16; without a gradient."""
    bits = v.view(torch.int32)
    dither = (bits >> 16).mul_(ODD).bitwise_and_(0xFFFF)
    return dither.add_(bits).bitwise_and_(-65536).view(torch.float32).bfloat16()


class _Dithered(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return dithered(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.float()


def rounded(v: Tensor, dtype: torch.dtype) -> Tensor:
    """v to dtype: dithered from fp32 to bf16, to the nearest otherwise; the gradient passes
    straight through.
    """
    return (
        _Dithered.apply(v) if (v.dtype, dtype) == (torch.float32, torch.bfloat16) else v.to(dtype)
    )
