"""Rounding to 16 bits that keeps small changes: v is rounded up with frequency (v - below) /
(above - below), where below and above are its two neighbours in the 16-bit dtype.

    dithered      the value's own bits decide: for sums and products that are computed again
    stochastic    fp32 random numbers: for a weight that is folded once (Gupta et al. 2015, arXiv
                  1502.02551)
    turned        16 random bits a value, shifted at every step: for weights that training stores at
                  every step

**dithered.** Rounding W + dW to the nearest drops every dW under half a unit; a dither keeps it on
average. Its bits are the value's own upper half times an odd constant, so the same value always
rounds the same way: a replayed checkpoint, another place in the batch, decoding and prefill agree.
Elements times a gain 1 + e, 1024 x 1536, compared with rounding to the nearest. Survival of the
change (its projection on the exact one): e near 1e-4: 1.01 (nearest 0.00), noise 6.7e-4 of |y|; e
near 1e-2: 1.00 (nearest 1.00), noise 2.3e-3 (nearest 1.7e-3).

**turned.** A weight that receives an update of p units goes up if u + t ODD / 2^16 (mod 1) lies in
an interval of length p, where u is the weight's own random number and t the step. Over the steps
that is a Kronecker sequence of the golden ratio (Niederreiter 1992, ch. 3): the sum of T equal
updates is off by O(log T) units, where independent random numbers are off by sqrt(T p (1 - p)).
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ODD = 0x9E37  # near 65536 / golden ratio: consecutive multiples of it lie far apart, modulo 65536


def dithered(v: Tensor) -> Tensor:
    """Round v, fp32 of any shape, to bf16 with its own bits as the dither; not differentiable."""
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
    """Round v, of any shape, to dtype: dithered from fp32 to bf16, to the nearest otherwise.

    The gradient passes straight through.
    """
    return (
        _Dithered.apply(v) if (v.dtype, dtype) == (torch.float32, torch.bfloat16) else v.to(dtype)
    )


def generator_of(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one tensor, which does not depend on the file it is stored in."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round x to one of its two neighbours in a narrower dtype, so that the expectation is x.

    It is exact among the subnormals of `dtype` too, where the unit no longer shrinks with x.

    Args:
        x: fp32 or fp64, finite, of any shape.
        generator: the source of one fp32 random number per value.
    """
    return _up_below(x.float(), dtype, torch.rand(x.shape, generator=generator))


def _up_below(x: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    """Round x, fp32, away from zero where u (x's shape, in [0, 1)) is below the remainder, in
    units; towards zero elsewhere.
    """
    info = torch.finfo(dtype)
    # the power of two at or under |x|
    binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = binade.clamp_min_(info.smallest_normal).mul_(info.eps)
    steps = x.abs().div_(unit)  # exact: unit is a power of two
    lower = steps.floor()
    return lower.add_(u < steps.sub_(lower)).mul_(unit).copysign_(x).to(dtype)


def turned(x: Tensor, dtype: torch.dtype, generator: torch.Generator, turn: int) -> Tensor:
    """Round x to one of its two neighbours in a 16-bit dtype, so that the expectation over the
    generator's seed is x.

    In bf16 the probabilities are exact, subnormals included; among the subnormals of fp16 they are
    at most 2^-16 too large. Values that are not finite become NaN.

    Args:
        x: fp32, of any shape.
        dtype: bf16 or fp16.
        generator: the source of 64 random bits for every 4 values.
        turn: the number of the step.
    """
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    u = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    u = u.to(torch.int32).add_(turn * ODD % 65536).bitwise_and_(0xFFFF).view(x.shape)
    if dtype is not torch.bfloat16:
        return _up_below(x, dtype, u * 2.0**-16)
    carried = u.add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    # a carry can turn NaN or infinity into a number; adding 0 x makes it NaN again
    return carried.add_(x, alpha=0).bfloat16()


class _Scattered(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, values: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.dtypes = w.dtype, values.dtype
        changed = w.clone(memory_format=torch.contiguous_format)
        flat = changed.view(-1)
        return flat.index_copy_(0, at, rounded(flat[at] + values, w.dtype)).view(w.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (at,) = ctx.saved_tensors
        need_w, need_values, _ = ctx.needs_input_grad
        own, small = ctx.dtypes
        return (
            g.to(own) if need_w else None,
            g.reshape(-1)[at].to(small) if need_values else None,
            None,
        )


def scatter_added(w: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """W with the values added, in W's shape and dtype; rounded as `rounded` does.

    Args:
        w: the matrix, of any shape.
        values: what is added (k,).
        at: the ascending positions (k,) in the flattened matrix.
    """
    return _Scattered.apply(w, values, at)
