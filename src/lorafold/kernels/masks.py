"""Masks of dropout on CUDA in Triton: one launch, where the plain form has more than a hundred."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafold.errors import LorafoldError
from lorafold.ops.dropout import source, threshold
from lorafold.ops.philox import FACTORS, ROUNDS, STEPS, halves

CALLS = 128  # of Philox in a program, each for 8 elements
CONSTANTS = {
    "FIRST": FACTORS[0], "SECOND": FACTORS[1], "STEP": STEPS[0], "OTHER": STEPS[1],
    "ROUNDS": ROUNDS, "CALLS": CALLS,
}  # fmt: skip
tl: Any = None  # Triton's language, once it is imported


def forms() -> Any:
    """The operations by their names. Raises LorafoldError where Triton is missing."""
    return _Forms()


def kernel() -> Any:
    """The kernel, which Triton compiles at its first call. Raises LorafoldError without Triton."""
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise LorafoldError("Triton is not installed") from None
    numbers = ["width", "limit", "low", "high", "site"]
    return triton.jit(do_not_specialize=numbers)(_dropped_mask)


class _Forms:
    def __init__(self) -> None:
        self._kernel = kernel()

    def dropped_mask(self, x: Tensor, p: float, names: Tensor | None, key: int, site: int) -> Any:
        names, key = source(x, names, key)
        width, limit = x.shape[-1], threshold(p)
        found = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        grid = len(names), -(-width // (8 * CALLS))
        given = names.contiguous(), found.view(torch.uint8), width, limit, *halves(key), site
        self._kernel[grid](*given, **CONSTANTS)
        return found


def _dropped_mask(  # type: ignore[no-untyped-def]
    names, found, width, limit, low, high, site, FIRST: tl.constexpr, SECOND: tl.constexpr,
    STEP: tl.constexpr, OTHER: tl.constexpr, ROUNDS: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """One row of elements and CALLS calls of Philox a program (`ops.philox`)."""
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
        x, y = tl.umulhi(a, first), tl.umulhi(c, second)
        a, b, c, d = y ^ b ^ k, c * second, x ^ d ^ m, a * first
        k, m = k + STEP, m + OTHER
    own = found + row * width
    for i in tl.static_range(4):
        word = a if i == 0 else b if i == 1 else c if i == 2 else d
        at = calls * 8 + 2 * i
        tl.store(own + at, ((word & 0xFFFF) < limit).to(tl.int8), mask=at < width)
        tl.store(own + at + 1, ((word >> 16) < limit).to(tl.int8), mask=at + 1 < width)
