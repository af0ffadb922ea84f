"""Grouped matrix multiplications for mixture-of-experts layers: each group of rows has its own
matrix.

    y_s = x_s M_e^T                     s a row of group e; x (S, in), M (E, k, in), y (S, k)
    y_s = W_e x_s + B_e A_e drop(x_s)   the same with a frozen W and a low-rank update, summed in
                                        one accumulator and rounded once (`ops.frozen`: one matrix)

Only groups with rows are computed, so a quantized W is dequantized one expert at a time. oneDNN
compiles a kernel for every new matmul shape, so groups are padded to multiples of `Groups.step`
rows, and the low-rank factors are multiplied with tiles of that many rows.

GPUs of compute capability 9 and 10 use `torch._grouped_mm` in bf16: it reads the group sizes on the
device, so the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafold.core.contexts import is_fake
from lorafold.ops.arithmetic import matmul_dtype, out_dtype
from lorafold.ops.autocast import Exact
from lorafold.ops.dropout import EMPTY, Dropped
from lorafold.ops.frozen import low_rank_parts
from lorafold.ops.host_tensors import send
from lorafold.ops.scale_and_add import SCALE
from lorafold.runtime.assumed_device import cuda_capability, device_type

# major versions for which torch has a grouped matmul kernel that reads the sizes on the device; for
# others, torch loops over the groups and waits for the sizes
GROUPED_MM_MAJORS = (9, 10)
GROUPED_UNIT = 8  # the sides of its 16-bit matrices must be multiples of this


def groups_at_once(x: Tensor) -> bool:
    """Returns whether one kernel multiplies all groups of rows on the device of x (any shape), so
    that the host does not need their sizes.
    """
    return device_type(x) == "cuda" and cuda_capability(x)[0] in GROUPED_MM_MAJORS


@dataclass(frozen=True)
class Groups:
    """S sorted rows in groups, each padded to a multiple of `step` rows. `of_row` (S,) is the group
    of each row.

    `known` holds the group sizes, or None if only the device has them; then `ends` (E,), int32,
    holds the end of each group.
    """

    of_row: Tensor
    step: int
    known: tuple[int, ...] | None
    ends: Tensor | None = None

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each group. Waits for the device if only the device has them."""
        if self.known is not None:
            return self.known
        assert self.ends is not None
        return tuple(self.ends.diff(prepend=self.ends.new_zeros(1)).tolist())

    @property
    def tiles(self) -> Tensor:
        """The group (n,) of each tile of `step` rows; no tile contains rows of two groups."""
        return self.of_row[:: self.step]

    def spans(self, times: int = 1) -> Iterator[tuple[int, slice]]:
        """Yields the index and the rows of each group that has rows, as if each row occurred
        `times` times.
        """
        start = 0
        for number, size in enumerate(self.sizes):
            if size:
                yield number, slice(start, start + size * times)
                start += size * times


def sort_into_groups(of_row: Tensor, number: int) -> tuple[Groups, Tensor, Tensor]:
    """Sorts S rows into `number` groups by `of_row` (S,), padded with copies of the first row to P
    rows.

    Returns the groups, the source row of each of the P places (P,) and the place of each row (S,).
    For fake tensors, the groups have equal sizes.
    """
    n, device = len(of_row), of_row.device
    # sizes are multiples of a quarter of their mean, as a power of two
    step = 1 << max(0, (n // (4 * number)).bit_length() - 1)
    # the total is rounded up too, so that the number of tiles rarely changes
    whole = step * max(1, number // 4)
    stays = n > 0 and groups_at_once(of_row)  # the sizes stay on the device; the host doesn't wait
    if is_fake(of_row) and not stays:
        share = -(-n // (number * step)) * step
        full = (*(share,) * (number - 1), share + (step * number // 2 + whole - 1) // step * step)
        rows = of_row.new_zeros(sum(full))
        return Groups(rows, step, full), rows, torch.zeros_like(of_row)
    order = of_row.sort(stable=True).indices
    counted = torch.zeros(number, dtype=torch.long, device=device)
    sizes = counted.index_add_(0, of_row, torch.ones_like(of_row, dtype=torch.long))
    if not stays:
        sizes = sizes.cpu()  # the only wait for the device
    padded = (sizes + step - 1).div_(step, rounding_mode="floor").mul_(step)
    ends = known = None
    if stays:
        # room for the largest possible number of rows; unused ones belong to the last group
        room, last = (-(-n // step) + number) * step, padded.cumsum(0)
        shift = (last - padded).sub_(sizes.cumsum(0)).add_(sizes)  # padding before each group
        shift = shift.index_select(0, of_row.index_select(0, order))
        at = torch.arange(n, device=device).add_(shift)
        last[-1].fill_(room)
        groups = torch.searchsorted(last, torch.arange(room, device=device), right=True)
        ends = last.to(torch.int32)
    else:
        padded[-1] += -padded.sum() % whole
        shift = (padded - sizes).cumsum(0) - (padded - sizes)  # padding before each group
        at = send(torch.arange(n).add_(shift.repeat_interleave(sizes)), device)
        groups = send(torch.arange(number).repeat_interleave(padded), device)
        known = tuple(padded.tolist())
    rows = torch.zeros_like(groups).index_copy_(0, at, order)
    places = torch.empty_like(order).index_copy_(0, order, at)
    return Groups(groups, step, known, ends), rows, places


class FrozenMatrices(NamedTuple):
    """The frozen matrices of groups: read(e, dtype) returns W_e (out, in), read_all(dtype) all of
    them (E, out, in).
    """

    read: Callable[[int, torch.dtype], Tensor]
    read_all: Callable[[torch.dtype], Tensor]
    groups: Groups

    def at_once(self, x: Tensor, width: int) -> bool:
        """Returns whether one `torch._grouped_mm` handles all rows x (S, in), for outputs of
        `width` features.
        """
        if self.groups.ends is None or x.dtype is not torch.bfloat16:
            return False
        return x.shape[1] % GROUPED_UNIT == 0 == width % GROUPED_UNIT

    def matmul(
        self, x: Tensor, width: int, back: bool, residual: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """Returns W_e x_s + residual_s (S, width) for all rows x (S, in), rounded once; with
        `back`, W_e is transposed. `out` (S, width), which may be `residual`, is overwritten.

        `torch._grouped_mm` can't start from an accumulator, so its sum with `residual` is rounded
        with a dither, which preserves small updates on average.
        """
        if self.at_once(x, width):
            every = self.read_all(x.dtype)
            y = torch._grouped_mm(x, every if back else every.mT, self.groups.ends)
            ones = (torch.ones if is_fake(y) else _ones)(width, device=y.device)
            return y if residual is None else SCALE(y, ones, None, residual)
        out = x.new_empty(len(x), width) if out is None else out
        for e, at in self.groups.spans():
            w = self.read(e, x.dtype) if back else self.read(e, x.dtype).t()
            if residual is None:
                torch.mm(x[at], w, out=out[at])
            else:
                torch.addmm(residual[at].to(x.dtype), x[at], w, out=out[at])
        return out


@cache
def _ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, device=device)


class _Product(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, spans: list[tuple[int, slice]]) -> Tensor:
        ctx.dtype = dtype = matmul_dtype(x)
        wide, wide_m = x.to(dtype), m.to(dtype)
        ctx.save_for_backward(x, m)
        ctx.spans = spans
        y = wide.new_empty(len(x), m.shape[1])
        for e, at in spans:
            torch.mm(wide[at], wide_m[e].t(), out=y[at])
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, m = ctx.saved_tensors
        wide = g.to(ctx.dtype)
        gx = gm = None
        if ctx.needs_input_grad[0]:
            wide_m, gx = m.to(ctx.dtype), wide.new_empty(x.shape)
            for e, at in ctx.spans:
                torch.mm(wide[at], wide_m[e], out=gx[at])
            gx = gx.to(x.dtype)
        if ctx.needs_input_grad[1]:
            wide_x, gm = x.to(ctx.dtype), wide.new_zeros(m.shape)
            for e, at in ctx.spans:
                torch.mm(wide[at].t(), wide_x[at], out=gm[e])
            gm = gm.to(m.dtype)
        return gx, gm, None


def product(x: Tensor, m: Tensor, groups: Groups) -> Tensor:
    """Returns x (S, ..., in) times the matrix of its group, m (E, k, in): (S, ..., k), in x's
    dtype.
    """
    return _Product.over_rows(x, m, list(groups.spans(prod(x.shape[1:-1]))))


class _Frozen(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, w: FrozenMatrices, out: int) -> Any:
        ctx.w, ctx.width, ctx.dtype = w, x.shape[1], matmul_dtype(x)
        ctx.residual_dtype = None if residual is None else residual.dtype
        return w.matmul(x.to(ctx.dtype), out, False, residual).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        need_x, need_residual, *_ = ctx.needs_input_grad
        wide = g.to(ctx.dtype)
        gx = ctx.w.matmul(wide, ctx.width, True, None).to(g.dtype) if need_x else None
        return gx, g.to(ctx.residual_dtype) if need_residual else None, None, None


# x (S, in) times the frozen matrix of its group, plus residual (S, out) or None before the
# rounding: (S, out), in x's dtype; the last argument is `out`
frozen_product: Callable[[Tensor, Tensor | None, FrozenMatrices, int], Tensor] = _Frozen.apply


class _LowRank(Exact):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: FrozenMatrices, down: Tensor, up: Tensor, drop: Dropped | None,
        k: float,
    ) -> Tensor:  # fmt: skip
        wide, a, b, xd, where, scale = low_rank_parts(x, down, up, drop, k)
        branch, tiles = wide if where is None else xd.to(wide.dtype), w.groups.tiles
        u = torch.bmm(branch.view(len(tiles), -1, branch.shape[1]), a[tiles].mT)
        y = torch.bmm(u, b[tiles].mT).view(len(x), -1)
        y = w.matmul(wide, y.shape[1], False, y, y)
        ctx.save_for_backward(xd, u, a, b, where)
        ctx.w, ctx.scale, ctx.dtype = w, scale, down.dtype
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        xd, u, a, b, where = ctx.saved_tensors
        need_x, _, need_down, need_up, *_ = ctx.needs_input_grad
        wide, tiles = g.to(u.dtype), ctx.w.groups.tiles
        gt, xt = (z.reshape(*u.shape[:2], -1) for z in (wide, xd.to(u.dtype)))
        v = torch.bmm(gt, b[tiles])
        gx = gdown = gup = None
        if need_x:
            gx = torch.bmm(v, a[tiles]).view(xd.shape)
            if where is not None:
                EMPTY(gx, where)
            gx = ctx.w.matmul(wide, gx.shape[1], True, gx, gx).to(g.dtype)
        if need_down:
            gdown = _summed(v.mT, xt, tiles, a.shape, ctx.dtype)
        if need_up:
            gup = _summed(u.mT, gt, tiles, b.mT.shape, ctx.dtype, ctx.scale).mT
        return gx, None, gdown, gup, None, None


def _summed(
    a: Tensor, b: Tensor, tiles: Tensor, shape: torch.Size, dtype: torch.dtype, k: float = 1.0
) -> Tensor:
    """Returns k times the sum of the products a b over the tiles (n,) of each group, (E, r, m), for
    a (n, r, l) and b (n, l, m).
    """
    parts = torch.bmm(a, b, **out_dtype(a, dtype)).to(dtype)
    return parts.new_zeros(shape).index_add_(0, tiles, parts, alpha=k)


# W_e x + k up_e down_e drop(x), (S, out), in x's dtype; e is the group of each row of x (S, in);
# down (E, r, in), up (E, out, r)
low_rank_product: Callable[
    [Tensor, FrozenMatrices, Tensor, Tensor, Dropped | None, float], Tensor
] = _LowRank.apply
