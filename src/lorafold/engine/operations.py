"""The operations of a pass: those of `ops.decoding`, and norms, rotations and gates without
gradients, by their forms on one kind of device (`kernels.table`).

Masks and attention are for rows that are at different positions:

    o_t = sum_j p_tj v_j,   p_t = softmax_j(scale q_t k_j + m_tj),   m_tj = 0 where the model's own
                            predicate lets position start + t see position j, else -inf

q (B, H, T, D), k (B, Hk, K, D), v (B, Hk, K, Dv) -> (B, T, H, Dv). transformers asks a function of
its registry for a model's mask and gives it a predicate on positions (causal, sliding, chunked);
here that is evaluated at each row's own positions. `Operations.attend` computes with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lorafold.engine.steady import attend as attend_as_trained
from lorafold.kernels.table import DECODING, use
from lorafold.ops.decoding import ATTEND, LOW_RANK, STORED, WRITE
from lorafold.ops.gated import GATED
from lorafold.ops.norm import NORM
from lorafold.ops.rotary import ROTARY
from lorafold.ops.scale import SCALE, scaled
from lorafold.step.documents import attend

log = logging.getLogger(__name__)

# by device, the operations whose numbers for a row are the same bits whatever rows and tokens are
# beside it, which is what a request's answer rests on
INDEPENDENT = {
    "": frozenset({"write", "rotary", "scale"}),
    "cpu": frozenset(operation.name for operation in DECODING if operation is not STORED),
}


class Operations:
    """Final: the operations by name. Each has the parameters of its plain form.

    Args:
        device: the kind of device, whose forms are in use; without it the plain forms.
        as_trained: attend as training does.
    """

    def __init__(self, device: str = "", as_trained: bool = False) -> None:
        self.name = (device or "plain") + "_as_trained" * as_trained
        self.independent = INDEPENDENT.get(device, INDEPENDENT[""])
        self.stored, self.low_rank = STORED.on(device), LOW_RANK.on(device)
        self.attend, self.write, self.gated = ATTEND.on(device), WRITE.on(device), GATED.on(device)
        if as_trained:
            self.attend = attend_as_trained
        self._norm, self._turned = NORM.on(device), ROTARY.on(device)
        self._scale = SCALE.on(device)

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        """`lorafold.ops.norm.rms_norm`: x (..., d) normalized, times the gain (d,).

        Args:
            x: the input (..., d).
            gain: the gain (d,).
            eps: what is added to the mean square.
        """
        y: Tensor = self._norm(x.contiguous(), gain, eps)
        return y

    def scale(self, y: Tensor, g: Tensor, c: Tensor | None) -> Tensor:
        """`lorafold.ops.scale.scale`: y times gains, plus offsets.

        Args:
            y: the output of a layer (B, T, k).
            g, c: a gain and an offset, fp32, of all rows (k,) or of each (B, k).
        """
        if g.dim() > 1:
            g, c = g[:, None], None if c is None else c[:, None]
        # torch's dispatcher takes longer, which counts on a CPU alone
        half = SCALE if y.is_cuda else self._scale
        z: Tensor = (half if y.dtype is torch.bfloat16 else scaled)(y.contiguous(), g, c, None)
        return z

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`lorafold.ops.rotary.rotary`: x (..., D) rotated by halves.

        Args:
            x: the input (B, H, T, D).
            cos, sin: constants that broadcast to x.
        """
        y: Tensor = self._turned(x, cos, sin, False)
        return y


def available(device: str, as_trained: bool = False) -> Operations:
    """The operations in their forms for a kind of device; the plain ones where there are none or,
    which the log says, where they can't be compiled.

    Args:
        as_trained: attend as training does.
    """
    if why := use(DECODING, device):
        log.info("the engine's operations run in torch: %s", why)
    return Operations("" if why else device, as_trained)


def slot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    **protocol: Any,
) -> Tensor | None:
    """The mask (B, 1, T, K) that is added to the scores, where the offset has a number for each
    row; else transformers' boolean mask. A function of transformers' mask protocol.

    Args:
        batch_size: B, the number of rows.
        q_length, kv_length: T and K, the numbers of queries and keys.
        q_offset: the position of the first query, one for each row (B,).
        mask_function: called as mask_function(b, head, i, j) on index tensors, it tells whether
            query i of row b may see key j.
        protocol: the position of the first key (`kv_offset`), padding (`attention_mask`), whether
            mask_function takes single numbers only (`use_vmap`), the device and the dtype of the
            mask, and what other masks take.
    """
    if not isinstance(q_offset, Tensor) or q_offset.dim() == 0:
        others: dict[str, Any] = protocol | {"q_offset": q_offset, "allow_is_causal_skip": False}
        return sdpa_mask(batch_size, q_length, kv_length, mask_function=mask_function, **others)
    if protocol.get("use_vmap") or protocol.get("attention_mask") is not None:
        raise NotImplementedError("a mask that is no predicate on the positions of all rows")
    device, kv_offset = protocol.get("device", "cpu"), protocol.get("kv_offset", 0)
    b = torch.arange(batch_size, device=device)[:, None, None, None]
    i = (q_offset[:, None] + torch.arange(q_length, device=device))[:, None, :, None]
    j = torch.arange(kv_offset, kv_offset + kv_length, device=device)[None, None, None]
    seen = mask_function(b, torch.zeros_like(b), i, j)
    masked = torch.zeros(seen.shape, dtype=protocol.get("dtype", torch.float32), device=device)
    return masked.masked_fill_(~seen, float("-inf"))


def slot_attention(operations: Operations) -> Callable[..., tuple[Tensor, None]]:
    """A function of transformers' attention protocol, which computes (B, T, H, Dv) of query
    (B, H, T, D), key (B, Hk, K, D) and value (B, Hk, K, Dv), under a mask (B, 1, T, K) that is
    added to the scores, a boolean one, or none. The general attention computes what has a softcap,
    sinks or a position bias. Nothing trains here, so that nothing is dropped.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **protocol: Any,
    ) -> tuple[Tensor, None]:
        special = any(protocol.get(n) is not None for n in ("softcap", "s_aux", "position_bias"))
        if attention_mask is None or attention_mask.dtype == torch.bool or special:
            others = protocol | {"dropout": 0.0}
            return attend(module, query, key, value, attention_mask, scaling, **others)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        mask = attention_mask
        if mask.shape[-1] != key.shape[2]:  # else it is the one that all layers are given
            mask = mask[..., : key.shape[2]]
        return operations.attend(query, key, value, mask, scale), None

    return attention
