"""Passes whose numbers are training's, bit by bit, so that a policy can be compared exactly.

    o_t = attention over the keys 0 to start + t of row b, by the kernel that packed documents have

A query's sums run over its keys in the order of a document, whatever stands beside it, so that it
matters neither how many tokens a pass has nor where the keys lie. Products of a matrix have one
order from a few rows on (`engine.steady`), and passes get so many. What is left is what training
lays on a model itself: its fused parts, its adapters' own code and its head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lorafold.engine.steady import plain_products
from lorafold.kernels.table import TRAINING, use
from lorafold.ops.arithmetic import FEW
from lorafold.ops.attention import FORWARD, Scores
from lorafold.ops.decoding import ATTEND
from lorafold.ops.documents import Documents

WIDE = 4096  # rows of a matrix that are enough to tell: a head has many times as many


def lacks(device: str) -> str:
    """Why passes on a kind of device can't have training's numbers, or nothing."""
    return use(TRAINING) if device == "cpu" else f"found a model on {device}, expected one on a CPU"


def unsteady(shapes: Iterable[tuple[int, int]], dtype: torch.dtype) -> bool:
    """Whether products with matrices (out, in) of these shapes depend on the number of rows on this
    processor, even where that is FEW.
    """
    return plain_products({(min(out, WIDE), inn) for out, inn in shapes}, dtype) > FEW


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention (B, T, H, Dv) of slots, in the order of documents. What sees other keys than all up
    to its own, as in a window, is computed by `lorafold.ops.decoding.ATTEND`.

    Args:
        q: the queries (B, H, T, D).
        k, v: the keys and values (B, Hk, K, D) and (B, Hk, K, Dv).
        mask: (B, 1, T, K), 0 or -inf, which is added to the scores.
        scale: the factor of the scores.
    """
    rows, heads, tokens, _ = q.shape
    at = torch.arange(k.shape[2])
    lens = (mask[:, 0] == 0).sum(-1)  # (B, T)
    causal = torch.equal(mask[:, 0] == 0, at < lens[..., None])
    if not causal or not torch.equal(lens, lens[:, :1] + torch.arange(tokens)):
        y: Tensor = ATTEND.on(q.device.type)(q, k, v, mask, scale)
        return y
    starts, ends = (lens[:, 0] - 1).tolist(), lens[:, -1].tolist()
    row, key = (at < lens[:, -1:]).nonzero(as_tuple=True)
    docs = Documents(tuple(ends), None, tuple(starts))
    flat = q.transpose(1, 2).reshape(rows * tokens, heads, -1)
    out: Tensor = FORWARD(flat, k[row, :, key], v[row, :, key], docs, Scores(scale, None))
    return out.view(rows, tokens, heads, -1)
