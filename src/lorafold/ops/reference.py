"""The operations of this package in plain torch, one step a line: what the fast ones must equal, in values and in gradients.

Use them to read what an operation means, and as the oracle of its tests; they keep every intermediate tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, lens: Sequence[int], window: int | None, scale: float, softcap: float | None = None
) -> Tensor:
    """q (T, H, D), k (T, Hk, D), v (T, Hk, Dv) -> (T, H, Dv): causal attention in each document alone, of `lens` tokens, sum T."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = []
    for qi, ki, vi in zip(*(x.transpose(0, 1).split(list(lens), 1) for x in (q, k, v)), strict=True):  # (H, t, D)
        scores = qi @ ki.mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        back = torch.arange(qi.shape[1], device=q.device)[:, None] - torch.arange(qi.shape[1], device=q.device)
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        out.append(torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ vi)
    return torch.cat(out, 1).transpose(0, 1)


def labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V), labels (B, T) the target of each position or -100 -> the cross-entropy summed over the labelled positions."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
