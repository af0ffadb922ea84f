"""The numbers in which 16-bit matrices are multiplied: those that the processor at hand is faster with.

    x W^T = round(wide(x) wide(W)^T)        wide: to fp32, exact; the sum is fp32 either way, and is rounded once

A processor with matrix units, or with two pipes for bf16, multiplies bf16 at twice fp32's rate and more. One with a single pipe takes half
of fp32's rate, and one without any instruction for it a tenth or less; there, a pass over memory to widen both matrices is soon paid back.
Which of them this is, no flag tells: it is measured, once a process, in some 20 ms.

1024 x 576 times 576 x 1536 on two cores in GFLOP/s, bf16 and widened: AMD Zen 5 400 and 150; Intel Xeon with AVX512-BF16 but without AMX
165 and 300, of which the gradient 165 and 280; the same held to AVX2 27 and 280, of which the gradient 5 and 285.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

ROWS = 64  # below, reading W is what takes the time, and it is half as long in 16 bits
CLEARLY = 0.8  # of the time: the choice must not hang on noise


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype to multiply x (..., in) in: its own, or fp32 where that is clearly faster with the conversions counted."""
    if x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.dtype
    return torch.float32 if x.numel() >= ROWS * x.shape[-1] and widening_pays(x.dtype) else x.dtype


@cache
def widening_pays(dtype: torch.dtype) -> bool:
    """Is a product of two matrices of this dtype clearly faster in fp32 on this CPU?"""
    x, w = (torch.ones(size, 512, dtype=dtype) for size in (256, 512))
    took: dict[torch.dtype, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products that wait for a core which another process has would tell of that
    try:
        for _ in range(8):  # in turn; the fastest of each counts
            for wide in (dtype, torch.float32):
                start = time.perf_counter()
                (x.to(wide) @ w.to(wide).t()).to(dtype)
                took[wide] = min(time.perf_counter() - start, took.get(wide, float("inf")))
    finally:
        torch.set_num_threads(threads)
    return took[torch.float32] < CLEARLY * took[dtype]


class _Widened(Function):
    """x m^T in fp32, which keeps what it was given and no wider copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor) -> Tensor:
        ctx.save_for_backward(x, m)
        return (x.float() @ m.float().t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, m = ctx.saved_tensors
        wide = g.float()
        gx = (wide @ m.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        return gx, (wide.t() @ x.float()).to(m.dtype) if ctx.needs_input_grad[1] else None


def linear(x: Tensor, m: Tensor) -> Tensor:
    """x (..., in), m (k, in) of any dtype -> x m^T (..., k) in x's dtype."""
    if arithmetic(x) is x.dtype:
        return F.linear(x, m.to(x.dtype))
    y: Tensor = _Widened.apply(x.reshape(-1, x.shape[-1]), m)
    return y.view(*x.shape[:-1], -1)
