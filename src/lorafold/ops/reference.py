"""The operations of this package in plain torch, one step a line: what the fast ones must equal, in
values and in gradients.

Use them to read what an operation means, and as the oracle of its tests; they keep every
intermediate tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def document_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Sequence[int],
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """q (T, H, D), k (T, Hk, D), v (T, Hk, Dv) -> (T, H, Dv): causal attention in each document
    alone, of `lens` tokens, sum T.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = []
    # (H, t, D)
    for qi, ki, vi in zip(
        *(x.transpose(0, 1).split(list(lens), 1) for x in (q, k, v)), strict=True
    ):
        scores = qi @ ki.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(qi.shape[1], device=q.device)[:, None] - torch.arange(
            qi.shape[1], device=q.device
        )
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        out.append(torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ vi)
    return torch.cat(out, 1).transpose(0, 1)


def labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V), labels (B, T) the target of each position or -100 -> the cross-entropy
    summed over the labelled positions.
    """
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def low_rank_linear(
    x: Tensor, w: Tensor, down: Tensor, up: Tensor, keep: Tensor | None, scale: float
) -> Tensor:
    """x (..., in), w (out, in), down (r, in), up (out, r), keep 0 or 1 in x's shape -> (..., out):
    W x + scale up down (keep x).
    """
    seen = x if keep is None else x * keep
    u = F.linear(seen, down.to(x.dtype))
    return F.linear(x, w) + F.linear(u, (scale * up).to(x.dtype))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x (..., d), gain (d,) -> (..., d) in x's dtype: x over the root of its mean square, times the
    gain, in fp32 or wider.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r * gain).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, D), cos and sin that broadcast to it -> (..., T, D): the pairs (x[i], x[i + D /
    2]) turned by an angle each.
    """
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def gated(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """gate, up (..., k) -> (..., k)"""
    return act(gate) * up
