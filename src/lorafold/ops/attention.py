"""Causal attention over packed documents, each of which attends only to itself.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(cap * tanh(scale * q_i k_j / cap)),   j in document(i),
                            i - window < j <= i

q (T, H, D), k (T, Hk, D), v (T, Hk, Dv) -> (T, H, Dv); query head h reads key head h // (H / Hk)
(grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245). The attention is computed in tiles
of at most TILE queries, so no tensor has size T x T, and the backward pass recomputes the
probabilities. Gradients of keys in shared prefixes are accumulated in fp32. On CUDA, torch's
FlashAttention (Dao 2023, arXiv 2307.08691) is used if it supports the inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafold.ops.arithmetic import HALF, matmul_dtype, override_widening
from lorafold.ops.autocast import Exact, at_least_fp32, lower
from lorafold.ops.checkpoint_segments import saved_for_replay
from lorafold.ops.operators import Operation, operator
from lorafold.ops.packed_documents import Documents
from lorafold.runtime.assumed_device import cuda_capability, device_type
from lorafold.runtime.devices import AMPERE

# From this document length on, checkpointing keeps the output of attention, because it is no larger
# than a block's input, but the time to recompute it grows with the square of the length.
SAVE_FROM_LENGTH = 4096
# requirements of torch's FlashAttention; head sizes must be multiples of FLASH_HEAD_UNIT
FLASH_MAX_HEAD_SIZE, FLASH_HEAD_UNIT, FLASH_CAPABILITY = 256, 8, AMPERE


class Scores(NamedTuple):
    scale: float
    cap: float | None


def _softmax(scores: Tensor, mask: Tensor, scale: float) -> None:
    scores.copy_(torch.softmax(torch.add(mask, scores, alpha=scale), -1))


def _gradient(gp: Tensor, p: Tensor, scale: float) -> None:
    gp.copy_(torch.ops.aten._softmax_backward_data(gp, p, -1, p.dtype)).mul_(scale)


# both overwrite their first argument
SOFTMAX = operator(
    "softmax_(Tensor(a!) scores, Tensor mask, float scale) -> ()", _softmax, lambda *args: None
)
BACKWARD = operator(
    "softmax_backward_(Tensor(a!) gp, Tensor p, float scale) -> ()", _gradient, lambda *args: None
)


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor, scores: Scores
) -> tuple[Tensor, Tensor | None]:
    """Returns the probabilities (b, G * t, s) and, for the backward pass of a cap, the tanh."""
    p, (scale, cap) = torch.bmm(q, k.mT), scores
    if cap is None:
        SOFTMAX(p, mask, scale)
        return p, None
    t = p.mul_(scale / cap).tanh_()
    p = t.clone()
    SOFTMAX(p, mask, cap)
    return p, t


def _attend(q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores) -> Tensor:
    dtype, k, v = matmul_dtype(q), docs.gather(k), docs.gather(v)
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for tiles in docs.groups():
        ks, vs = (tiles[0].keys(x, dtype) for x in (k, v))
        for tile in tiles:
            qi, mask = tile.queries(q, kv_heads, dtype), docs.mask(tile, groups, ks)
            p, _ = _probabilities(qi, ks[:, tile.seen], mask, scores)
            tile.put_queries(out, torch.bmm(p, vs[:, tile.seen]))
    return out


def _attend_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, kv_heads, groups = matmul_dtype(q), k.shape[1], q.shape[1] // k.shape[1]
    # several tiles, and documents with a shared prefix, add to a key's gradient, and in bf16 each
    # sum would be rounded
    wide, tokens = at_least_fp32(k), len(k)
    k, v = docs.gather(k), docs.gather(v)
    gq = torch.empty_like(q)
    gk, gv = (torch.empty_like(x, dtype=x.dtype if docs.keys is None else wide) for x in (k, v))
    for tiles in docs.groups():
        ks, vs = (tiles[0].keys(x, dtype) for x in (k, v))
        gks, gvs = (x.new_zeros(x.shape, dtype=wide) for x in (ks, vs))
        for tile in tiles:
            qi, gi = (tile.queries(x, kv_heads, dtype) for x in (q, g))
            ki, vi = ks[:, tile.seen], vs[:, tile.seen]
            p, t = _probabilities(qi, ki, docs.mask(tile, groups, ks), scores)
            gvs[:, tile.seen] += torch.bmm(p.mT, gi)
            gs = torch.bmm(gi, vi.mT)
            BACKWARD(gs, p, scores.scale)
            if t is not None:
                gs.mul_(1 - t * t)
            tile.put_queries(gq, torch.bmm(gs, ki))
            gks[:, tile.seen] += torch.bmm(gs.mT, qi)
        tiles[0].put_keys(gk, gks)
        tiles[0].put_keys(gv, gvs)
    gk, gv = (docs.scatter(x, tokens).to(k.dtype) for x in (gk, gv))
    return gq, gk, gv


FORWARD = Operation("document_attention", _attend)
GRADIENTS = Operation("document_attention_backward", _attend_backward)


class _DocumentAttention(Exact):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.docs, ctx.scores = docs, scores
        ctx.widened = matmul_dtype(q) != q.dtype

        run = partial(FORWARD, q, k, v, docs, scores)
        return saved_for_replay(run) if max(docs.lens) >= SAVE_FROM_LENGTH else run()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with override_widening(widened=ctx.widened, rows=1):  # as the forward did
            gradients = GRADIENTS(g, *ctx.saved_tensors, ctx.docs, ctx.scores)
        return *gradients, None, None


def flash_supports(q: Tensor, v: Tensor) -> bool:
    """Returns whether FlashAttention supports q (..., D) and v (..., Dv) of one dtype and device.
    """
    return (
        device_type(q) == "cuda"
        and q.dtype in HALF
        and q.shape[-1] == v.shape[-1] <= FLASH_MAX_HEAD_SIZE
        and q.shape[-1] % FLASH_HEAD_UNIT == 0
        and cuda_capability(q) >= FLASH_CAPABILITY
    )


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, scale: float, softcap: float | None = None
) -> Tensor:
    """Returns causal attention (T, H, Dv) within each document, for q (T, H, D), k (T, Hk, D), v
    (T, Hk, Dv).
    """
    q, k, v = (lower(x) for x in (q, k, v))
    if softcap is None and flash_supports(q, v):
        return docs.flash_attention(q, docs.gather(k), docs.gather(v), scale)
    return _DocumentAttention.apply(q, k, v, docs, Scores(scale, softcap))
