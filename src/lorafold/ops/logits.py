"""The cross-entropy of logits, and their gradient in the same memory.

    loss_i = log sum_j exp(z_ij) - z_iy        z (m, V) logits, y = targets_i
    gu_ij  = scale (p_ij - [j = y]) (1 - (z_ij / cap)^2)
                                               p = softmax(z), z = cap tanh(scale u / cap); without
                                               a cap z = scale u, and the last factor is 1

`cross_entropy` uses it for a chunk of positions at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafold.ops.operators import operator

BLOCK = 32  # positions with probabilities in fp32 at a time: 32 x 49,152 of them stay in cache


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses and their sums are computed in: fp32, or `dtype` if it is wider."""
    return torch.promote_types(dtype, torch.float32)


def _losses(
    z: Tensor,
    targets: Tensor,
    losses: Tensor,
    block: Tensor,
    scale: float,
    cap: float | None,
    gradient: bool,
) -> None:
    """Write the losses (m,) of logits z (m, V), and over z, if wanted, the gradient of W h + b.

    Args:
        targets: the targets (m,).
        losses: the losses (m,), written.
        block: memory (BLOCK, V), overwritten.
        scale: the factor of W h + b.
        cap: the cap of the logits, or None.
    """
    blocks = (x.split(BLOCK) for x in (z, targets[:, None], losses))
    for z_block, y, loss in zip(*blocks, strict=True):
        p = z_block if z.dtype is loss.dtype else block[: len(z_block)].copy_(z_block)
        top, z_y = p.amax(-1), p.gather(1, y)[:, 0]
        # the derivative of the cap, 1 - (z / cap)^2
        slope = None if cap is None else (p / -cap).mul_(p).div_(cap).add_(1)
        torch.softmax(p, -1, out=p)
        # log sum exp(z) = top - log p(top), without another pass of exp
        torch.sub(top - p.amax(-1).log(), z_y, out=loss)
        if not gradient:
            continue
        p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
        if slope is not None:
            p.mul_(slope)
        if scale != 1.0:
            p.mul_(scale)
        if p is not z_block:
            z_block.copy_(p)


LOSSES = operator(
    "cross_entropy_(Tensor(a!) z, Tensor targets, Tensor(b!) losses, Tensor(c!) block, float scale,"
    " float? cap, bool gradient) -> ()",
    _losses,
    lambda *args: None,
)
