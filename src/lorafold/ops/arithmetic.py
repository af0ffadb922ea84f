"""The numbers in which 16-bit matrices are multiplied: those that the processor at hand is faster
with.

    x W^T = round(wide(x) wide(W)^T)        wide: to fp32, exact; the sum is fp32 either way, and is
                                            rounded once

A processor with matrix units (AMX), or with AVX512-BF16 at full rate (AMD's), multiplies bf16 at
twice fp32's rate and more. Intel's without AMX has half of fp32's rate, and one without an
instruction for it a tenth or less; there, a pass over memory to widen both matrices is soon paid
back. What the processor is decides, not a stopwatch, so that a run repeats itself on a busy machine
too.

    with multiplying(widened=True): ...     decides in the processor's place, until the `with` ends

A backward multiplies in what its forward did, wherever it runs. Checkpointed blocks run their
forward anew in the backward, which then belongs into the scope too. Graphs that `torch.compile`
makes, and devices other than the CPU, multiply 16-bit matrices as they are, whatever is said here.

1024 x 576 times 576 x 1536 on two cores in GFLOP/s, bf16 and widened: Intel Xeon with AVX512-BF16
but without AMX 165 and 300, its gradient 165 and 280; the same held to AVX2 27 and 280, its
gradient 5 and 285. AMD EPYC with AVX512-BF16: bf16 400, fp32 140 to 180.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
ROWS = 64  # below, reading W is what takes the time, and it is half as long in 16 bits
_said: ContextVar[bool | None] = ContextVar("widened", default=None)  # None: as the processor is


@contextmanager
def multiplying(*, widened: bool) -> Iterator[None]:
    """Multiply 16-bit matrices widened to fp32, or as they are, whatever processor this is.

    It holds in this thread or task, until the `with` ends. The innermost of several counts.
    """
    token = _said.set(widened)
    try:
        yield
    finally:
        _said.reset(token)


def widens(dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Are matrices of that dtype widened on that device of this machine? On its CPU 16-bit ones
    are where `multiplying` says so, and else where the CPU is faster so.
    """
    if dtype not in HALF or device.type != "cpu":
        return False
    said = _said.get()
    return widening_pays(dtype) if said is None else said


def arithmetic(x: Tensor) -> torch.dtype:
    """The dtype to multiply x (..., in) in: its own, or fp32 where that is clearly faster with the
    conversions counted, or asked for.
    """
    if torch.compiler.is_compiling() or not widens(x.dtype, x.device):
        return x.dtype
    return torch.float32 if x.numel() >= ROWS * x.shape[-1] else x.dtype


@cache
def widening_pays(dtype: torch.dtype) -> bool:
    """Does this CPU multiply matrices of a 16-bit dtype clearly faster in fp32?"""
    if platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_amx_tile_supported():
        return False
    info = Path("/proc/cpuinfo")
    words = set(
        (info.read_text() if info.exists() else platform.processor()).replace(",", " ").split()
    )
    if dtype is torch.float16:
        return "avx512_fp16" not in words
    return not (torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in words)


class _Widened(Function):
    """x m^T + b in fp32, which keeps what it was given and no wider copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, m)
        ctx.bias = None if b is None else b.dtype
        y = F.linear(x.float(), m.float(), None if b is None else b.float())
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, m = ctx.saved_tensors
        wide = g.float()
        need_x, need_m, need_b = ctx.needs_input_grad
        gx = (wide @ m.float()).to(x.dtype) if need_x else None
        gm = (wide.t() @ x.float()).to(m.dtype) if need_m else None
        return gx, gm, wide.sum(0).to(ctx.bias) if need_b else None


def linear(x: Tensor, m: Tensor, b: Tensor | None = None) -> Tensor:
    """x (..., in), m (k, in), b (k,) of any dtype -> x m^T + b (..., k) in x's dtype."""
    if arithmetic(x) is x.dtype:
        return F.linear(x, m.to(x.dtype), None if b is None else b.to(x.dtype))
    y: Tensor = _Widened.apply(x.reshape(-1, x.shape[-1]), m, b)
    return y.view(*x.shape[:-1], -1)
