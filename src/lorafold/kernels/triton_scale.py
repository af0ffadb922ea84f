"""Gains on CUDA in Triton: one pass over the output of a layer and one back, where the plain form
writes it to memory in fp32 six times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorafold.core.rounding import ODD
from lorafold.errors import LorafoldError

FEATURES, ROWS = 256, 32  # of a program
CONSTANTS = {"FEATURES": FEATURES, "ROWS": ROWS}
tl: Any = None  # Triton's language, once it is imported


def forms() -> Any:
    """The operations by their names."""
    return _Forms()


def kernels() -> Any:
    """Both kernels, which Triton compiles at their first call."""
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise LorafoldError("Triton is not installed") from None
    jit = triton.jit(do_not_specialize=["size", "width", "each"])
    return jit(_scale), jit(_backward)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return -(-rows // ROWS), -(-width // FEATURES)


class _Forms:
    def __init__(self) -> None:
        self._scale, self._backward = kernels()

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
        self._scale[_grid(rows, width)](*tensors, *sizes, ODD=ODD, **added, **CONSTANTS)
        return out

    def scale_backward(self, z: Tensor, y: Tensor, g: Tensor, offset: bool) -> Any:
        if g.dim() != 1 or y.dtype is not torch.bfloat16 or g.dtype is not torch.float32:
            return NotImplemented
        z, y, found = z.contiguous(), y.contiguous(), torch.empty_like(y)
        rows, width = y.numel() // len(g), len(g)
        grid = _grid(rows, width)
        parts = g.new_empty((2 if offset else 1, grid[0], width))
        tensors = z, y, g.contiguous(), found, parts
        self._backward[grid](*tensors, y.numel(), width, OFFSET=offset, **CONSTANTS)
        sums = parts.sum(1)
        return found.view(z.shape), sums[0], sums[1] if offset else g.new_empty(0)


def _scale(  # type: ignore[no-untyped-def]
    y, g, c, onto, out, size, width, each, ODD: tl.constexpr, OFFSET: tl.constexpr,
    ONTO: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """g y + c + onto of ROWS rows, rounded with its own bits (`core.rounding.dithered`); `each`
    rows in turn share a gain.
    """
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        at = row * width + feature
        inside = (feature < width) & (at < size)
        own = (row // each) * width + feature
        value = tl.load(y + at, mask=inside).to(tl.float32) * tl.load(g + own, mask=inside)
        if OFFSET:
            value += tl.load(c + own, mask=inside)
        if ONTO:
            value += tl.load(onto + at, mask=inside).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True)
        carried = (((bits >> 16) * ODD) & 0xFFFF) + bits
        kept = (carried & -65536).to(tl.float32, bitcast=True)
        tl.store(out + at, kept.to(tl.bfloat16), mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    z, y, g, found, parts, size, width, OFFSET: tl.constexpr, FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """g z of ROWS rows, and the sums over them of z y and of z."""
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    known = feature < width
    gain = tl.load(g + feature, mask=known)
    # zeros: Triton's interpreter has `tl.zeros` only if it was chosen before Triton was imported
    of_gain = tl.load(g + feature, mask=feature < 0, other=0.0)
    of_offset = of_gain
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        at = row * width + feature
        inside = known & (at < size)
        top = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(found + at, (top * gain).to(tl.bfloat16), mask=inside)
        of_gain += top * tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        of_offset += top
    own = tl.program_id(0) * width + feature
    tl.store(parts + own, of_gain, mask=known)
    if OFFSET:
        tl.store(parts + tl.num_programs(0) * width + own, of_offset, mask=known)
