"""The operations of `lorafold.ops` in plain torch, one step a line: the specification of the fused
ones, in values and in gradients.

Use them to understand an operation, and as the oracle of its tests. They keep every intermediate
tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.ops.packed_documents import Documents


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, scale: float, softcap: float | None = None
) -> Tensor:
    """Causal attention (T, H, Dv) within each document, S tokens in all; T < S if some are shared.
    q (T, H, D); k (T, Hk, D); v (T, Hk, Dv).
    """
    lens, window = list(docs.lens), docs.window
    k, v = (x if docs.keys is None else x[docs.keys] for x in (k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = []
    # (H, t, D)
    for qi, ki, vi in zip(
        q.transpose(0, 1).split(list(docs.own), 1),
        k.transpose(0, 1).split(lens, 1),
        v.transpose(0, 1).split(lens, 1),
        strict=True,
    ):
        scores = qi @ ki.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        j = torch.arange(ki.shape[1], device=q.device)
        back = j[-qi.shape[1] :, None] - j
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        out.append(torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ vi)
    return torch.cat(out, 1).transpose(0, 1)


def labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V), labels (B, T) with the target of each position or -100 -> the cross-entropy
    summed over the positions that have a target, a scalar.
    """
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def low_rank_linear(
    x: Tensor, w: Tensor, down: Tensor, up: Tensor, keep: Tensor | None, scale: float
) -> Tensor:
    """W x + scale up down (keep x), (..., out). x (..., in); w (out, in); down (r, in); up (out,
    r).
    """
    seen = x if keep is None else x * keep
    u = F.linear(seen, down.to(x.dtype))
    return F.linear(x, w) + F.linear(u, (scale * up).to(x.dtype))


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x divided by the root of its mean square, times the gain: (..., d) in x's dtype, computed in
    fp32 or wider. x (..., d); gain (d,).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r * gain).to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x[i], x[i + D / 2]) rotated by one angle each, (..., T, D). x (..., T, D)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def gated(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """act(gate) * up, (..., k)."""
    return act(gate) * up
