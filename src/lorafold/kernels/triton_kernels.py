"""Operations on CUDA in Triton: dropout in one launch instead of more than a hundred, and the
scaling of a layer's output (DoRA, IA3) in one pass instead of six in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafold.core.rounding import ODD
from lorafold.errors import LorafoldError
from lorafold.ops.dropout import FACTORS, KEY_STEPS, ROUNDS, WORD, names_and_key, threshold

CALLS = 128  # calls of Philox per program, each for 8 elements
DROPOUT_CONSTANTS = {
    "FIRST": FACTORS[0], "SECOND": FACTORS[1], "STEP": KEY_STEPS[0], "OTHER": KEY_STEPS[1],
    "ROUNDS": ROUNDS, "CALLS": CALLS,
}  # fmt: skip
FEATURES, ROWS = 256, 32  # per program for gains
SCALE_CONSTANTS = {"FEATURES": FEATURES, "ROWS": ROWS}
tl: Any = None  # Triton's language, once it is imported


def jit(kernel: Any, *unspecialized: str) -> Any:
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise LorafoldError("Triton is not installed") from None
    return triton.jit(do_not_specialize=unspecialized)(kernel)


class _TritonDropout:
    def __init__(self) -> None:
        self.kernel = jit(_masked, "width", "limit", "low", "high", "site")

    def masked(self, x: Tensor, p: float, names: Tensor | None, key: int, site: int) -> Any:
        names, key = names_and_key(x, names, key)
        width, x = x.shape[-1], x.contiguous()
        masked, where = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
        grid = len(names), -(-width // (8 * CALLS))
        tensors = names.contiguous(), x, masked, where.view(torch.uint8)
        words = key & WORD, key >> 32 & WORD
        self.kernel[grid](*tensors, width, threshold(p), *words, site, **DROPOUT_CONSTANTS)
        return masked, where


def _masked(  # type: ignore[no-untyped-def]
    names, x, out, where, width, limit, low, high, site, FIRST: tl.constexpr, SECOND: tl.constexpr,
    STEP: tl.constexpr, OTHER: tl.constexpr, ROUNDS: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """Each program computes CALLS calls of Philox for one row (`ops.dropout`)."""
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
        tl.store(out + at, tl.where(drop, 0.0, value).to(value.dtype), mask=inside)
        tl.store(where + at, drop.to(tl.int8), mask=inside)


class _TritonScale:
    def __init__(self) -> None:
        self.forward, self.backward = (jit(k, "size", "width", "each") for k in (_scale, _backward))

    def scale(self, y: Tensor, g: Tensor, c: Tensor | None, onto: Tensor | None) -> Any:
        if g.dim() not in (1, 3) or y.dtype is not torch.bfloat16 or g.dtype is not torch.float32:
            return NotImplemented
        y, out = y.contiguous(), torch.empty_like(y, memory_format=torch.contiguous_format)
        width = g.shape[-1]
        rows, gains = y.numel() // width, g.numel() // width
        added = {"OFFSET": c is not None, "ONTO": onto is not None}
        offsets = g if c is None else c.float()
        top = y if onto is None else onto.expand_as(y).contiguous()
        tensors = y, g.contiguous(), offsets.contiguous(), top, out
        sizes = y.numel(), width, rows // gains
        grid = -(-rows // ROWS), -(-width // FEATURES)
        self.forward[grid](*tensors, *sizes, ODD=ODD, **added, **SCALE_CONSTANTS)
        return out

    def scale_backward(self, z: Tensor, y: Tensor, g: Tensor, offset: bool) -> Any:
        if g.dim() != 1 or y.dtype is not torch.bfloat16 or g.dtype is not torch.float32:
            return NotImplemented
        z, y, scaled = z.contiguous(), y.contiguous(), torch.empty_like(y)
        rows, width = y.numel() // len(g), len(g)
        grid = -(-rows // ROWS), -(-width // FEATURES)
        parts = g.new_empty((2 if offset else 1, grid[0], width))
        tensors = z, y, g.contiguous(), scaled, parts
        self.backward[grid](*tensors, y.numel(), width, OFFSET=offset, **SCALE_CONSTANTS)
        sums = parts.sum(1)
        return scaled.view(z.shape), sums[0], sums[1] if offset else g.new_empty(0)


def _scale(  # type: ignore[no-untyped-def]
    y, g, c, onto, out, size, width, each, ODD: tl.constexpr, OFFSET: tl.constexpr,
    ONTO: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Computes g y + c + onto for ROWS rows, rounded with their own bits
    (`core.rounding.dithered`); `each` consecutive rows share a gain.
    """
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        at = row * width + feature
        inside = (feature < width) & (at < size)
        gain_at = (row // each) * width + feature
        value = tl.load(y + at, mask=inside).to(tl.float32) * tl.load(g + gain_at, mask=inside)
        if OFFSET:
            value += tl.load(c + gain_at, mask=inside)
        if ONTO:
            value += tl.load(onto + at, mask=inside).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        carried = (((bits >> 16) * ODD) & 0xFFFF) + bits
        rounded = (carried & -65536).to(tl.float32, bitcast=True)
        tl.store(out + at, rounded.to(tl.bfloat16), mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    z, y, g, scaled, parts, size, width, OFFSET: tl.constexpr, FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Computes g z for ROWS rows of the output's gradient z, and the sums of z y and of z over
    these rows.
    """
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    known = feature < width
    gain = tl.load(g + feature, mask=known)
    # zeros: Triton's interpreter lacks `tl.zeros` if it was enabled after Triton was imported
    of_gain = tl.load(g + feature, mask=feature < 0, other=0.0)
    of_offset = of_gain
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        at = row * width + feature
        inside = known & (at < size)
        top = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(scaled + at, (top * gain).to(tl.bfloat16), mask=inside)
        of_gain += top * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        of_offset += top
    part_at = tl.program_id(0) * width + feature
    tl.store(parts + part_at, of_gain, mask=known)
    if OFFSET:
        tl.store(parts + tl.num_programs(0) * width + part_at, of_offset, mask=known)
