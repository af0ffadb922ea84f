"""Masks and attention for rows that are at different positions.

    o_t = sum_j p_tj v_j,   p_t = softmax_j(scale q_t k_j + m_tj),   m_tj = 0 where the model's own
                            predicate lets position start + t see position j, else -inf

q (B, H, T, D), k (B, Hk, K, D), v (B, Hk, K, Dv) -> (B, T, H, Dv). transformers asks a function of
its registry for a model's mask and gives it a predicate on positions (causal, sliding, chunked);
here that is evaluated at each row's own positions. `Operations.attend` computes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lorafold.engine.operations import Operations
from lorafold.step.documents import attend


def slot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **protocol: Any,
) -> Tensor | None:
    """The mask (B, 1, T, K) that is added to the scores, where the offset has a number for each
    row; else transformers' boolean mask. A function of transformers' mask protocol.

    Args:
        batch_size: B, the number of rows.
        q_length, kv_length: T and K, the numbers of queries and keys.
        q_offset: the position of the first query, one for each row (B,).
        kv_offset: the position of the first key.
        mask_function: called as mask_function(b, head, i, j) on index tensors, it tells whether
            query i of row b may see key j.
        attention_mask: (B, K), False at padding; None if there is none.
        use_vmap: whether mask_function takes single numbers only.
        device: the device of the mask.
        dtype: the dtype of the mask.
        protocol: arguments for other masks.
    """
    if not isinstance(q_offset, Tensor) or q_offset.dim() == 0:
        offset: Any = q_offset
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset=offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap,
            device=device, **(protocol | {"allow_is_causal_skip": False}),
        )  # fmt: skip
    if use_vmap or attention_mask is not None:
        raise NotImplementedError("a mask that is no predicate on the positions of all rows")
    b = torch.arange(batch_size, device=device)[:, None, None, None]
    i = (q_offset[:, None] + torch.arange(q_length, device=device))[:, None, :, None]
    j = torch.arange(kv_offset, kv_offset + kv_length, device=device)[None, None, None]
    seen = mask_function(b, torch.zeros_like(b), i, j)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def slot_attention(
    operations: Operations,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **protocol: Any,
) -> tuple[Tensor, None]:
    """Compute attention (B, T, H, Dv); a function of transformers' attention protocol.

    Args:
        operations: what computes it.
        module: the attention module.
        query, key, value: (B, H, T, D), (B, Hk, K, D) and (B, Hk, K, Dv).
        attention_mask: a mask (B, 1, T, K) that is added to the scores, a boolean one, or None.
        dropout: not used, since nothing trains here.
        scaling: the factor of the scores; None: D^-0.5.
        protocol: softcap, sinks and position bias, which the general attention computes.
    """
    special = any(protocol.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if attention_mask is None or attention_mask.dtype == torch.bool or special:
        return attend(module, query, key, value, attention_mask, 0.0, scaling, **protocol)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    mask = attention_mask[..., : key.shape[2]]
    return operations.attend(query, key, value, mask, scale), None
