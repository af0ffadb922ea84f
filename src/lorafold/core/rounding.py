"""Rounding to 16 bits that preserves small changes on average. A value v is rounded up with
frequency (v - below) / (above - below); below and above are its two neighbours in the 16-bit dtype.

    dithered      the value's own bits decide: for sums and products that are recomputed
    stochastic    fp32 random numbers: for a weight that is folded once (Gupta et al. 2015, arXiv
                  1502.02551)
    turn_rounded  16 random bits, shifted at every step: for weights stored at every step

**dithered.** The dither is the value's upper half times an odd constant, so a value always rounds
in the same way: when a checkpoint is recomputed, at another place in the batch, in decoding and in
prefill.

**turn_rounded.** A weight with an update of p units in the last place is rounded up if u + t ODD /
2^16 (mod 1) lies in an interval of length p; u is the weight's random number and t the step. Over
the steps, these values are a Kronecker sequence of the golden ratio (Niederreiter 1992, ch. 3). The
error of T equal updates is O(log T) units instead of sqrt(T p (1 - p)) with independent random
numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

ODD = 0x9E37  # near 65536 / golden ratio: consecutive multiples are far apart modulo 65536


def dithered(v: Tensor) -> Tensor:
    """Rounds v, fp32 of any shape, to bf16 with its own bits as the dither; not differentiable."""
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
    """Rounds v, of any shape, to dtype: with a dither from fp32 to bf16, to the nearest otherwise.

    The backward pass treats the rounding as the identity.
    """
    return (
        _Dithered.apply(v) if (v.dtype, dtype) == (torch.float32, torch.bfloat16) else v.to(dtype)
    )


def generator_of(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns the random generator of one tensor, independent of the file that contains the tensor.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds x (fp32 or fp64, finite, any shape) to one of its neighbours, with expectation x."""
    return _round_up_below(x.float(), dtype, torch.rand(x.shape, generator=generator))


def _round_up_below(x: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    """Rounds x, fp32, away from zero if u (same shape, in [0, 1)) is below the remainder."""
    info = torch.finfo(dtype)
    # the power of two at or under |x|
    binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    unit = binade.clamp_min_(info.smallest_normal).mul_(info.eps)
    steps = x.abs().div_(unit)  # exact: unit is a power of two
    lower = steps.floor()
    return lower.add_(u < steps.sub_(lower)).mul_(unit).copysign_(x).to(dtype)


def turn_rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator, turn: int) -> Tensor:
    """Rounds x (fp32, any shape) to a neighbour in bf16 or fp16, with expectation x over the
    generator's seed (exact in bf16; up to 2^-16 of a unit too large among fp16's subnormals).
    Non-finite values become NaN.
    """
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    u = draws.random_(-(2**63), None, generator=generator).view(torch.int16)[: x.numel()]
    u = u.to(torch.int32).add_(turn * ODD % 65536).bitwise_and_(0xFFFF).view(x.shape)
    if dtype is not torch.bfloat16:
        return _round_up_below(x, dtype, u * 2.0**-16)
    carried = u.add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    # a carry can turn NaN or infinity into a number; adding 0 x makes it NaN again
    return carried.add_(x, alpha=0).bfloat16()


class _Scattered(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, values: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.dtypes = w.dtype, values.dtype
        flat = w.clone(memory_format=torch.contiguous_format).view(-1)
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
    """Returns w (any shape) plus `values` (k,) at the ascending flat positions `at` (k,), `rounded`
    to w's dtype.
    """
    return _Scattered.apply(w, values, at)
