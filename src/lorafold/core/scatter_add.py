"""A matrix with values added at some of its entries, each rounded once.

    W'[at] = W[at] + values         W of any shape, at (k,) in row-major order, values (k,)

The other entries are copied as they are, so W is passed over once, and no matrix of zeros is built.
The gradient of the values is the gradient of W' at their places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lorafold.core.rounding import rounded


class _Scattered(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, values: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.dtypes = w.dtype, values.dtype
        changed = w.clone(memory_format=torch.contiguous_format)
        flat = changed.view(-1)
        return flat.index_copy_(0, at, rounded(flat[at] + values, w.dtype)).view(w.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (at,) = ctx.saved_tensors
        need_w, need_values, _ = ctx.needs_input_grad
        own, small = ctx.dtypes
        return (
            g.to(own) if need_w else None,
            g.reshape(-1)[at].to(small) if need_values else None,
            None,
        )


def scatter_added(w: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """W with the values added, in W's shape and dtype; rounded as `rounded` does.

    Args:
        w: the matrix, of any shape.
        values: what is added (k,).
        at: the ascending positions (k,) in the flattened matrix.
    """
    return _Scattered.apply(w, values, at)
