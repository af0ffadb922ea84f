"""Grouped linear layers (DeepSeek-V4's attention heads): each group of outputs has a separate
input.

    y_j = W_j x_j,  j = 1 .. g      x (..., g, in), W (out, in) = (W_1; ..; W_g),
                                    y (..., g, out / g)

A low-rank update is u_j = A x_j, with the same A (r, in) for all groups, and y_j + B_j u_j with the
group's rows of B (out, r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafold.core.active_adapters import DropoutSite, dropout_site, expert_token_names
from lorafold.errors import NotMergeable
from lorafold.layers.dense import Vectors
from lorafold.ops.arithmetic import linear
from lorafold.ops.autocast import autocasting, lowered
from lorafold.ops.scale_and_add import plain_scale_and_add


class GroupedLinear(Vectors):
    """A grouped linear layer: weight (out, in), inputs (..., g, in), no bias."""

    linear = True
    takes_vectors = False
    called = staticmethod(lowered)

    @property
    def groups(self) -> int:
        return int(self.bare.n_groups)

    @property
    def shape(self) -> tuple[int, int]:
        out, inn = self.bare.weight.shape
        return out, inn

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        w = self.bare.weight
        if onto is None and (autocasting(x) or x.dtype is w.dtype):
            return self.run(x)
        return self.op(x, w, onto)

    def op(self, x: Tensor, m: Tensor, onto: Tensor | None = None) -> Tensor:
        """Returns the product of each group of x (..., g, in) and its rows of m (k, in), k a
        multiple of g, plus `onto`: (..., g, k / g).
        """
        rows = m.to(x.dtype).unflatten(0, (self.groups, -1)).mT  # (g, in, k / g)
        shape = (*x.shape[:-1], rows.shape[-1])
        of_groups = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)  # (g, n, in)
        if onto is None:
            y = torch.bmm(of_groups, rows)
        else:
            start = onto.to(x.dtype).expand(shape).reshape(-1, *shape[-2:]).transpose(0, 1)
            y = torch.baddbmm(start, of_groups, rows)
        return y.transpose(0, 1).reshape(shape)

    def branch(self, x: Tensor, down: Tensor, up: Tensor, p: float) -> Tensor:
        return self.op(linear(self.drop(x, p), down), up)

    def site(self, x: Tensor) -> DropoutSite | None:
        g, tokens = self.groups, x.shape[:-2].numel()

        def of(names: Tensor) -> Tensor:
            return expert_token_names(names, torch.arange(tokens * g, device=names.device), g)

        return dropout_site(self.module, tokens, of)

    def each(self, v: Tensor) -> Tensor:
        return v.unflatten(-1, (self.groups, -1))

    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        return plain_scale_and_add(y, self.each(g), None if c is None else self.each(c), onto)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.bare.weight, None

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        if b is not None:
            raise NotMergeable("the adapter adds a bias, which a grouped linear can't store")
        return {"weight": w}
