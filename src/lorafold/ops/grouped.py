"""Grouped products: rows in groups, each group with a matrix of its own, as tokens meet experts.

    y_s = x_s M_e^T                     s a row of group e; x (S, in), M (E, k, in), y (S, k)
    y_s = W_e x_s + B_e A_e drop(x_s)   the same with a frozen W and a low-rank update, summed in
                                        one accumulator and rounded once (`ops.lora` for one matrix)

Rows of one group lie together. Only groups that have rows are computed, one product each, so a
quantized W is read for those experts alone, one at a time. Backward passes keep what those of
`ops.lora` keep, and read W again.

A product of a size that was not seen lately costs 0.6 ms before it begins, which is the time of
256 x 512 by 512 x 1024 (oneDNN makes a kernel for every shape; AMD EPYC, Zen 5). The number of
tokens that an expert gets is new at every step, so groups are filled up to a few sizes. These are
multiples of a step, and the low-rank factors meet tiles of so many rows, all in one product.

`torch._grouped_mm` computes all groups in one call, but not onto an accumulator, so that a small
update would be lost to a second rounding, and not from codes. On a CPU it is such a loop as well:
2048 rows in 8 groups, 512 x 2048 in bf16 on two cores, take 15.4 ms with it and 13.8 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.core.fake import is_fake
from lorafold.ops.arithmetic import arithmetic
from lorafold.ops.autocast import Exact
from lorafold.ops.dropout import Dropped, empty_
from lorafold.ops.host import sent
from lorafold.ops.lora import branched


@dataclass(frozen=True)
class Groups:
    """The groups of S rows that lie sorted: `sizes`, the number of rows of each, multiples of
    `step`, and `of_row` (S,), the group of each row.
    """

    sizes: tuple[int, ...]
    of_row: Tensor
    step: int = 1

    @property
    def tiles(self) -> Tensor:
        """The group of each tile of `step` rows (n,); no tile has rows of two groups."""
        return self.of_row[:: self.step]

    def spans(self, times: int = 1) -> Iterator[tuple[int, slice]]:
        """Yield the number of each group that has rows, and where its rows are, if each of the S
        rows is `times` rows.
        """
        start = 0
        for number, size in enumerate(self.sizes):
            if size:
                yield number, slice(start, start + size * times)
                start += size * times


class FrozenMatrices(NamedTuple):
    """The frozen matrices of groups: read(e, dtype) is W_e (out, in) of group e."""

    read: Callable[[int, torch.dtype], Tensor]
    groups: Groups


def step_of(rows: int, number: int) -> int:
    """What the sizes of groups are rounded up to: a quarter of their mean, as a power of two."""
    return 1 << max(0, (rows // (4 * number)).bit_length() - 1)


def grouped(of_row: Tensor, number: int) -> tuple[Groups, Tensor, Tensor]:
    """The groups that S rows form once they are sorted, their sizes rounded up by copies of the
    first row; the row that each of the P places in the groups gets (P,); and the place of each row
    (S,).

    Of rows without values (fake tensors) each group has an equal share.

    Args:
        of_row: the group of each row (S,).
    """
    step = step_of(len(of_row), number)
    # so many tiles that their number is rarely another: half a tile a group, and a quarter of these
    whole = step * max(1, number // 4)
    if is_fake(of_row):
        share = -(-len(of_row) // (number * step)) * step
        full = (*(share,) * (number - 1), share + (step * number // 2 + whole - 1) // step * step)
        rows = of_row.new_zeros(sum(full))
        return Groups(full, rows, step), rows, torch.zeros_like(of_row)
    order = of_row.sort(stable=True).indices
    counted = torch.zeros(number, dtype=torch.long, device=of_row.device)
    # the one value that is waited for: all else follows from it on the host
    sizes = counted.index_add_(0, of_row, torch.ones_like(of_row, dtype=torch.long)).cpu()
    padded = (sizes + step - 1).div_(step, rounding_mode="floor").mul_(step)
    padded[-1] += -padded.sum() % whole
    shift = (padded - sizes).cumsum(0) - (padded - sizes)  # the places filled before each group
    at = sent(torch.arange(len(of_row)).add_(shift.repeat_interleave(sizes)), of_row.device)
    groups = sent(torch.arange(number).repeat_interleave(padded), of_row.device)
    rows = torch.zeros_like(groups).index_copy_(0, at, order)
    places = torch.empty_like(order).index_copy_(0, order, at)
    return Groups(tuple(padded.tolist()), groups, step), rows, places


class _Product(Exact):
    """x (S, in) times m (E, k, in), by groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, spans: list[tuple[int, slice]]) -> Tensor:
        ctx.dtype = dtype = arithmetic(x)
        wide, wide_m = x.to(dtype), m.to(dtype)
        ctx.save_for_backward(x, m)
        ctx.spans = spans
        y = wide.new_empty(len(x), m.shape[1])
        for e, at in spans:
            torch.mm(wide[at], wide_m[e].t(), out=y[at])
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
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
    """x times the matrix of its group: (S, ..., k), in x's dtype. Differentiable once.

    Args:
        x: the input (S, ..., in).
        m: one matrix for each group (E, k, in), of any dtype.
        groups: the groups of the S rows.
    """
    flat = x.reshape(-1, x.shape[-1])
    times = len(flat) // max(1, len(x))
    y: Tensor = _Product.apply(flat, m, list(groups.spans(times)))
    return y.view(*x.shape[:-1], m.shape[1])


class _Frozen(Exact):
    """x (S, in) times frozen W_e (out, in), plus onto (S, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, onto: Tensor | None, w: FrozenMatrices, out: int) -> Tensor:
        ctx.w, ctx.width = w, x.shape[1]
        ctx.onto = None if onto is None else onto.dtype
        ctx.dtype = dtype = arithmetic(x)
        wide, y = x.to(dtype), x.new_empty(len(x), out, dtype=dtype)
        for e, at in w.groups.spans():
            w_e = w.read(e, dtype).t()
            if onto is None:
                torch.mm(wide[at], w_e, out=y[at])
            else:
                torch.addmm(onto[at].to(dtype), wide[at], w_e, out=y[at])
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gx = None
        if ctx.needs_input_grad[0]:
            wide = g.to(ctx.dtype)
            gx = wide.new_empty(len(g), ctx.width)
            for e, at in ctx.w.groups.spans():
                torch.mm(wide[at], ctx.w.read(e, ctx.dtype), out=gx[at])
            gx = gx.to(g.dtype)
        return gx, g.to(ctx.onto) if ctx.needs_input_grad[1] else None, None, None


def frozen_product(x: Tensor, onto: Tensor | None, w: FrozenMatrices, out: int) -> Tensor:
    """x times the frozen matrix of its group, plus onto: (S, out), in x's dtype. Differentiable
    once.

    Args:
        x: the input (S, in).
        onto: what is added before the rounding, (S, out), or None.
        w: the matrices, and the groups of the S rows.
        out: the size of the output.
    """
    y: Tensor = _Frozen.apply(x, onto, w, out)
    return y


class _LowRank(Exact):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: FrozenMatrices, down: Tensor, up: Tensor, drop: Dropped | None
    ) -> Tensor:
        dtype = arithmetic(x)
        xd, where, scale = branched(x, drop)
        a, b = down.to(dtype), (up * scale).to(dtype)
        wide = x.to(dtype)
        branch = wide if where is None else xd.to(dtype)
        tiles = w.groups.tiles
        u = torch.bmm(branch.view(len(tiles), -1, branch.shape[1]), a[tiles].mT)
        y = torch.bmm(u, b[tiles].mT).view(len(x), -1)
        for e, at in w.groups.spans():
            y[at].addmm_(wide[at], w.read(e, dtype).t())
        ctx.save_for_backward(xd, u, a, b, where)
        ctx.w, ctx.scale, ctx.dtype = w, scale, down.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        xd, u, a, b, where = ctx.saved_tensors
        need_x, _, need_down, need_up, _ = ctx.needs_input_grad
        wide, tiles = g.to(u.dtype), ctx.w.groups.tiles
        gt, xt = (z.reshape(*u.shape[:2], -1) for z in (wide, xd.to(u.dtype)))
        v = torch.bmm(gt, b[tiles])
        gx = gdown = gup = None
        if need_x:
            gx = torch.bmm(v, a[tiles]).view(xd.shape)
            if where is not None:
                empty_(gx, where)
            for e, at in ctx.w.groups.spans():
                gx[at].addmm_(wide[at], ctx.w.read(e, wide.dtype))
            gx = gx.to(g.dtype)
        if need_down:
            gdown = _summed(torch.bmm(v.mT, xt), tiles, a.shape, ctx.dtype)
        if need_up:
            gup = _summed(torch.bmm(u.mT, gt), tiles, b.mT.shape, ctx.dtype).mT.mul(ctx.scale)
        return gx, None, gdown, gup, None


def _summed(parts: Tensor, tiles: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The sums over the tiles of each group, (E, r, k), in a dtype.

    Args:
        parts: what each tile contributes (n, r, k).
        tiles: the group of each tile (n,).
    """
    return parts.new_zeros(shape, dtype=dtype).index_add_(0, tiles, parts.to(dtype))


def low_rank_product(
    x: Tensor, w: FrozenMatrices, down: Tensor, up: Tensor, drop: Dropped | None = None
) -> Tensor:
    """W_e x + k up_e down_e drop(x), (S, out), in x's dtype, e the group of each row, k the factor
    of `drop`. Differentiable once.

    Args:
        x: the input (S, in).
        w: the matrices, and the groups of the S rows.
        down: the down factors (E, r, in).
        up: the up factors (E, out, r).
        drop: x with dropped elements, the input of the branch (None: x).
    """
    y: Tensor = _LowRank.apply(x, w, down, up, drop)
    return y
