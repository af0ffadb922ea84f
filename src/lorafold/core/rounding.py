"""Rounding to 16 bits that loses no small change: of the two neighbours of v, the one above is
taken for a share (v - below) / (above - below) of values. Who says for which of them:

    dithered      the value's own bits: for sums and products that are computed again and again
    stochastic    fp32 random numbers: for a weight that is folded once (Gupta et al. 2015, arXiv
                  1502.02551)
    turned        16 random bits a value, which turn from one step to the next: for weights that
                  training stores in every step

**dithered.** W + dW and g y are sums and products with something that lies on the bf16 grid
already, so rounding them to the nearest drops every dW and every gain under half a unit. A dither
keeps them on average: its bits are the value's own upper half times an odd constant, so the same
value always rounds the same way (a replayed checkpoint, another place in the batch, decoding and
prefill agree), and a value on the grid stays what it is.

Elements times a gain 1 + e, survival of the change (projection on it) and noise against rounding to
the nearest, 1024 x 1536: e near 1e-4: 1.01 (nearest 0.00), noise 6.7e-4 of |y|; e near 1e-2: 1.00
(nearest 1.00), noise 2.3e-3 (nearest 1.7e-3).

**turned.** A weight that receives an update of p units goes up if u + t ODD / 2^16 (mod 1) lies in
an interval of length p, u the weight's own random number and t the step. Whatever t, that happens
with probability p. Over the steps it is a Kronecker sequence of the golden ratio (Niederreiter
1992, ch. 3): T equal updates are off by O(log T) units together, where independent numbers are off
by sqrt(T p (1 - p)), so the weight stays closer to where fp32 would have it.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ODD = 0x9E37  # near 65536 / golden ratio: consecutive multiples of it lie far apart, modulo 65536


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


def generator_of(
    seed: int, name: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The random stream of one tensor: it depends on its name and not on the shard it lies in."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x (fp32 or fp64, finite) to a narrower dtype: one of its two neighbours there, right in
    expectation.

    Exact also among the subnormals of `dtype`, where the unit no longer shrinks with x.
    """
    return _up_below(x.float(), dtype, torch.rand(x.shape, generator=generator))


def _up_below(x: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    """x fp32 to the neighbour away from zero where u is less than what the other leaves of it, in
    units.
    """
    info = torch.finfo(dtype)
    # the power of two at or under |x|
    binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = binade.clamp_min_(info.smallest_normal).mul_(info.eps)
    steps = x.abs().div_(unit)  # exact: unit is a power of two
    lower = steps.floor()
    return lower.add_(u < steps.sub_(lower)).mul_(unit).copysign_(x).to(dtype)


def turned(x: Tensor, dtype: torch.dtype, generator: torch.Generator, turn: int) -> Tensor:
    """x fp32 to a 16-bit dtype: one of its two neighbours there, right in expectation over the
    generator's seed. It takes 64 random bits for 4 values.

    Exact in bf16, subnormals included; among the subnormals of fp16 a probability is at most 2^-16
    too large. What is not finite becomes NaN.
    """
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    u = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    u = u.to(torch.int32).add_(turn * ODD % 65536).bitwise_and_(0xFFFF).view(x.shape)
    if dtype is not torch.bfloat16:
        return _up_below(x, dtype, u * 2.0**-16)
    carried = u.add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    # a carry can make a number of what is none, and 0 x is none either then
    return carried.add_(x, alpha=0).bfloat16()
