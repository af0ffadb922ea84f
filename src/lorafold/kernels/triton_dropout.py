"""Dropout on CUDA in Triton: one launch, where the plain form has more than a hundred."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.ops.dropout import FACTORS, ROUNDS, STEPS, WORD, source, threshold

CALLS = 128  # of Philox in a program, each for 8 elements
CONSTANTS = {
    "FIRST": FACTORS[0], "SECOND": FACTORS[1], "STEP": STEPS[0], "OTHER": STEPS[1],
    "ROUNDS": ROUNDS, "CALLS": CALLS,
}  # fmt: skip
tl: Any = None  # Triton's language, once it is imported


def forms() -> Any:
    """The operations by their names."""
    return _Forms()


def kernel() -> Any:
    """The kernel, which Triton compiles at its first call."""
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise LorafoldError("Triton is not installed") from None
    numbers = ["width", "limit", "low", "high", "site"]
    return triton.jit(do_not_specialize=numbers)(_masked)


class _Forms:
    def __init__(self) -> None:
        self._kernel = kernel()

    def masked(self, x: Tensor, p: float, names: Tensor | None, key: int, site: int) -> Any:
        names, key = source(x, names, key)
        width, x = x.shape[-1], x.contiguous()
        kept, where = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        grid = len(names), -(-width // (8 * CALLS))
        tensors = names.contiguous(), x, kept, where.view(torch.uint8)
        words = key & WORD, key >> 32 & WORD
        self._kernel[grid](*tensors, width, threshold(p), *words, site, **CONSTANTS)
        return kept, where


def _masked(  # type: ignore[no-untyped-def]
    names, x, kept, where, width, limit, low, high, site, FIRST: tl.constexpr, SECOND: tl.constexpr,
    STEP: tl.constexpr, OTHER: tl.constexpr, ROUNDS: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """One row of elements and CALLS calls of Philox a program (`ops.dropout`)."""
    row = tl.program_id(0).to(tl.int64)
    calls = tl.program_id(1) * CALLS + tl.arange(0, CALLS)
    name = tl.load(names + row)
    a = calls.to(tl.uint32)
    zero = a & 0
    first, second = zero + FIRST, zero + SECOND
    b = zero + (name & 0xFFFFFFFF).to(tl.uint32)
    c = zero + (name >> 32).to(tl.uint32)
    d = zero + site.to(tl.uint32)
    k, m = zero + low.to(tl.uint32), zero + high.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        v, w = tl.umulhi(a, first), tl.umulhi(c, second)
        a, b, c, d = w ^ b ^ k, c * second, v ^ d ^ m, a * first
        k, m = k + STEP, m + OTHER
    start = row * width
    for i in tl.static_range(8):
        word = a if i // 2 == 0 else b if i // 2 == 1 else c if i // 2 == 2 else d
        drop = (word >> 16 if i % 2 else word & 0xFFFF) < limit
        at, inside = start + calls * 8 + i, calls * 8 + i < width
        value = tl.load(x + at, mask=inside)
        tl.store(kept + at, tl.where(drop, 0.0, value).to(value.dtype), mask=inside)
        tl.store(where + at, drop.to(tl.int8), mask=inside)
