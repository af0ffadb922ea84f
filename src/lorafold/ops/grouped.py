"""Grouped products: rows in groups, each group with a matrix of its own, as tokens meet experts.

    y_s = x_s M_e^T                     s a row of group e; x (S, in), M (E, k, in), y (S, k)
    y_s = W_e x_s + B_e A_e drop(x_s)   the same with a frozen W and a low-rank update, summed in
                                        one accumulator and rounded once (`ops.frozen`: one matrix)

Rows of one group lie together. Only groups that have rows are computed, one product each, so a
quantized W is read for those experts alone, one at a time. Backward passes keep what those of
`ops.frozen` keep, and read W again.

`torch._grouped_mm` computes all groups in one call, but not onto an accumulator, so that the sum is
rounded a second time, and not from codes. GPUs of compute capability 9 and 10 take it in bf16,
since the sizes of the groups stay on the device then: nothing is waited for, and launches do not
grow with the experts. On a CPU it is such a loop as well: 2048 rows in 8 groups, 512 x 2048 in bf16
on two cores, take 15.4 ms with it and 13.8 here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.core.contexts import is_fake
from lorafold.ops.arithmetic import HALF, arithmetic, narrowed
from lorafold.ops.autocast import Exact
from lorafold.ops.dropout import EMPTY, Dropped
from lorafold.ops.groups import Groups
from lorafold.ops.kernel_requirements import GROUPED_UNIT
from lorafold.ops.scale import SCALE


class FrozenMatrices(NamedTuple):
    """The frozen matrices of groups: read(e, dtype) is W_e (out, in) of group e, read_all(dtype)
    has all of them (E, out, in).
    """

    read: Callable[[int, torch.dtype], Tensor]
    read_all: Callable[[torch.dtype], Tensor]
    groups: Groups

    def at_once(self, x: Tensor, out: int) -> bool:
        """Whether the products of all rows x (S, in) are one, to or from `out` features."""
        if self.groups.ends is None or x.dtype is not torch.bfloat16:
            return False
        return x.shape[1] % GROUPED_UNIT == 0 == out % GROUPED_UNIT


def _added(w: FrozenMatrices, x: Tensor, onto: Tensor, back: bool) -> Tensor:
    """W_e x_s + onto_s of all rows x (S, in), rounded once, or with the transposed W_e; `onto`
    (S, out) is overwritten.

    Where the products are one, which has no accumulator to begin from, their sum with `onto` is
    rounded with a dither, so that a small update is kept on average.
    """
    if w.at_once(x, onto.shape[1]):
        return _sum(_at_once(w, x, back), onto)
    for e, at in w.groups.spans():
        w_e = w.read(e, x.dtype)
        onto[at].addmm_(x[at], w_e if back else w_e.t())
    return onto


def _sum(y: Tensor, onto: Tensor) -> Tensor:
    """y + onto (S, out), rounded with a dither."""
    ones = (torch.ones if is_fake(y) else _ones)(y.shape[1], device=y.device)
    found: Tensor = SCALE(y, ones, None, onto)
    return found


@cache
def _ones(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, device=device)


def _at_once(w: FrozenMatrices, x: Tensor, back: bool) -> Tensor:
    every = w.read_all(x.dtype)
    return torch._grouped_mm(x, every if back else every.mT, w.groups.ends)


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
        wide = x.to(dtype)
        if w.at_once(wide, out):
            y = _at_once(w, wide, back=False)
            return y if onto is None else _sum(y, onto)
        y = wide.new_empty(len(x), out)
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
            if ctx.w.at_once(wide, ctx.width):
                gx = _at_once(ctx.w, wide, back=True)
            else:
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
        ctx: Any, x: Tensor, w: FrozenMatrices, down: Tensor, up: Tensor, drop: Dropped | None,
        k: float,
    ) -> Tensor:  # fmt: skip
        dtype = arithmetic(x)
        xd, where, scale = x, None, k
        if drop is not None:
            xd, where, scale = drop.x.reshape(x.shape), drop.where, drop.scale * k
        a, b = narrowed(down, 1.0, dtype), narrowed(up, scale, dtype)
        wide = x.to(dtype)
        branch = wide if where is None else xd.to(dtype)
        tiles = w.groups.tiles
        u = torch.bmm(branch.view(len(tiles), -1, branch.shape[1]), a[tiles].mT)
        y = _added(w, wide, torch.bmm(u, b[tiles].mT).view(len(x), -1), back=False)
        ctx.save_for_backward(xd, u, a, b, where)
        ctx.w, ctx.scale, ctx.dtype = w, scale, down.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
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
            gx = _added(ctx.w, wide, gx, back=True).to(g.dtype)
        if need_down:
            gdown = _summed(v.mT, xt, tiles, a.shape, ctx.dtype)
        if need_up:
            gup = _summed(u.mT, gt, tiles, b.mT.shape, ctx.dtype, ctx.scale).mT
        return gx, None, gdown, gup, None, None


def _summed(
    a: Tensor, b: Tensor, tiles: Tensor, shape: torch.Size, dtype: torch.dtype, k: float = 1.0
) -> Tensor:
    """k times the sums of a b over the tiles of each group, (E, r, m), in a dtype.

    Args:
        a, b: what each tile multiplies, (n, r, l) and (n, l, m).
        tiles: the group of each tile (n,).
    """
    wide: dict[str, Any] = (
        {"out_dtype": dtype} if a.is_cuda and a.dtype in HALF and dtype is torch.float32 else {}
    )
    parts = torch.bmm(a, b, **wide).to(dtype)
    return parts.new_zeros(shape).index_add_(0, tiles, parts, alpha=k)


def low_rank_product(
    x: Tensor, w: FrozenMatrices, down: Tensor, up: Tensor, drop: Dropped | None = None,
    k: float = 1.0,
) -> Tensor:  # fmt: skip
    """W_e x + k up_e down_e drop(x), (S, out), in x's dtype, e the group of each row.
    Differentiable once.

    Args:
        x: the input (S, in).
        w: the matrices, and the groups of the S rows.
        down: the down factors (E, r, in).
        up: the up factors (E, out, r).
        drop: x with dropped elements, the input of the branch (None: x).
        k: a factor of the branch, which up is multiplied with before any rounding.
    """
    y: Tensor = _LowRank.apply(x, w, down, up, drop, k)
    return y
