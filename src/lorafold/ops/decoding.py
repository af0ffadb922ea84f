"""Operations of the engine's forward pass for which torch has no single kernel.

    low_rank    y_b = [up_s(b) down_s(b) x_b, ...]      x (B, T, in), parts of down (slots, r, in)
                                                        and up (slots, r, out) -> (B, T, out + ...)
    attend      o = softmax(scale q k^T + m) v          q (B, H, T, D), k (B, Hk, K, D), v (B, Hk,
                                                        K, Dv), m (B, 1, T, K) -> (B, T, H, Dv)

On a CPU, stacked factors are fp32, because batched matmuls with one row are three times as fast as
in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorafold.ops.arithmetic import matmul_dtype
from lorafold.ops.autocast import at_least_fp32
from lorafold.ops.operators import Operation


class SlotFactors(NamedTuple):
    """The stacked factors down (slots, r, in) and up (slots, r, width), or None, and their ranks
    (slots,), int64 on the CPU.
    """

    down: Tensor | None
    up: Tensor | None
    ranks: Tensor
    width: int


Product = Callable[[Tensor], Tensor]  # (B, T, in) -> (B, T, out)


def compact_index(rows: Tensor) -> int | slice | Tensor:
    """Returns an index that selects these rows (n,) without a copy: the number if all are equal, a
    slice if they are consecutive, otherwise the rows themselves.
    """
    first, n = int(rows[0]), len(rows)
    if torch.equal(rows, torch.full_like(rows, first)):
        return first
    return slice(first, first + n) if torch.equal(rows, torch.arange(first, first + n)) else rows


def stored_dtype(factors: Tensor) -> torch.dtype:
    """Returns the dtype in which `low_rank` expects stacks of factors like these (n, r, in)."""
    return torch.float32 if factors.device.type == "cpu" else factors.dtype


def low_rank(parts: Sequence[SlotFactors], slots: Tensor) -> Product:
    """Returns a function that multiplies each row of x (B, T, in) by the factors of its slot (B,),
    and concatenates the results of the parts.
    """
    products = [_low_rank(part, slots) for part in parts]

    def product(x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in products], -1)

    return product if len(parts) > 1 else products[0]


def _low_rank(part: SlotFactors, slots: Tensor) -> Product:
    down, up, _, width = part
    if down is None or up is None:
        return lambda x: x.new_zeros(*x.shape[:2], width)
    at = compact_index(slots)
    down, up = down[at], up[at]

    def product(x: Tensor) -> Tensor:
        # the factors are exact in x's dtype; with one token, the stored dtype is faster
        dtype = down.dtype if x.shape[1] == 1 else matmul_dtype(x)
        return (x.to(dtype) @ down.to(dtype).mT @ up.to(dtype)).to(x.dtype)

    return product


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:  # (B, T, H, Dv)
    """Returns the attention of T queries per row, for q (B, H, T, D), k (B, Hk, K, D), v (B, Hk, K,
    Dv) and mask (B, 1, T, K).
    """
    (b, heads, t, d), kv = q.shape, k.shape[1]
    groups = heads // kv
    m = _mask_of_heads(mask, kv, groups if t > 1 else 1, t)
    q, k, v = q.reshape(b * kv, groups * t, d), k.flatten(0, 1), v.flatten(0, 1)
    if t == 1:
        scores = torch.add(m, torch.bmm(k, q.mT).mT, alpha=scale)
    else:
        scores = torch.baddbmm(m, q, k.mT, alpha=scale)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(b, heads, t, -1).transpose(1, 2)


def _mask_of_heads(mask: Tensor, kv: int, groups: int, t: int) -> Tensor:
    """Returns the mask (B, 1, T, K) for all heads, (B kv, groups T, K), cached on the mask for all
    layers.
    """
    known = vars(mask).setdefault("_lorafold_of_heads", {})
    if (kv, groups) not in known:
        m = mask[:, :, None].expand(len(mask), kv, groups, t, mask.shape[-1])
        m = m.reshape(len(mask) * kv, -1, mask.shape[-1])
        known[kv, groups] = m.to(at_least_fp32(m)) if t == 1 else m
    return known[kv, groups]


STORED, LOW_RANK = Operation("stored", stored_dtype), Operation("low_rank", low_rank)
ATTEND = Operation("attend", attend)
