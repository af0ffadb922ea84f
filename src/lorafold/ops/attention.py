"""Causal attention over packed documents, each of which attends only to itself.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(cap * tanh(scale * q_i k_j / cap)),   j in document(i),
                            i - window < j <= i

q (T, H, D), k (T, Hk, D), v (T, Hk, Dv) -> (T, H, Dv); query head h reads key head h // (H / Hk)
(grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245). Computed in tiles of at most TILE
queries, so no tensor has size T x T; the backward pass recomputes the probabilities. Gradients of
keys in shared prefixes are accumulated in fp32. On CUDA, torch's FlashAttention
(Dao 2023, arXiv 2307.08691) is used if it supports the inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorafold.ops.arithmetic import HALF, arithmetic, multiplying
from lorafold.ops.autocast import Exact, at_least_fp32, lower
from lorafold.ops.checkpoint_segments import kept
from lorafold.ops.operators import Operation, operator
from lorafold.ops.packed_documents import Documents
from lorafold.runtime.assumed_device import cuda_capability, device_type
from lorafold.runtime.devices import AMPERE

# From this document length on, checkpointing keeps the output of attention: it is no larger than a
# block's input, but the time to recompute it grows with the square of the length.
LONG = 4096
# requirements of FlashAttention as torch builds it: a multiple of FLASH_HEAD_UNIT
FLASH_MAX_HEAD_SIZE, FLASH_HEAD_UNIT, FLASH_CAPABILITY = 256, 8, AMPERE


class Scores(NamedTuple):
    """The scores: cap tanh(scale q k / cap), or scale q k without a cap."""

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
    """The probabilities (b, G * t, s), and the tanh for the backward pass of a cap."""
    p, (scale, cap) = torch.bmm(q, k.mT), scores
    if cap is None:
        SOFTMAX(p, mask, scale)
        return p, None
    t = p.mul_(scale / cap).tanh_()
    p = t.clone()
    SOFTMAX(p, mask, cap)
    return p, t


def _attended(q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores) -> Tensor:
    dtype, k, v = arithmetic(q), docs.gathered(k), docs.gathered(v)
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    for tiles in docs.groups():
        ks, vs = (tiles[0].keys(x, dtype) for x in (k, v))
        for tile in tiles:
            qi, mask = tile.queries(q, kv_heads, dtype), docs.mask(tile, groups, ks)
            p, _ = _probabilities(qi, ks[:, tile.seen], mask, scores)
            tile.put_queries(out, torch.bmm(p, vs[:, tile.seen]))
    return out


def _attended_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, kv_heads, groups = arithmetic(q), k.shape[1], q.shape[1] // k.shape[1]
    # several tiles, and documents with a shared prefix, add to a key's gradient, and in bf16 each
    # sum would be rounded
    wide, tokens = at_least_fp32(k), len(k)
    k, v = docs.gathered(k), docs.gathered(v)
    gq = torch.empty_like(q)
    # gradients of shared keys are accumulated in fp32 or wider
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
    gk, gv = (docs.scattered(x, tokens).to(k.dtype) for x in (gk, gv))
    return gq, gk, gv


FORWARD = Operation("document_attention", _attended)
GRADIENTS = Operation("document_attention_backward", _attended_backward)


class _DocumentAttention(Exact):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.docs, ctx.scores = docs, scores
        ctx.widened = arithmetic(q) != q.dtype

        run = partial(FORWARD, q, k, v, docs, scores)
        return kept(run) if max(docs.lens) >= LONG else run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        with multiplying(widened=ctx.widened, rows=1):  # as the forward did
            gradients = GRADIENTS(g, *ctx.saved_tensors, ctx.docs, ctx.scores)
        return *gradients, None, None


def flash_supports(q: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention supports q (..., D) and v (..., Dv) of one dtype and device."""
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
    """Causal attention (T, H, Dv) within each document, for q (T, H, D), k (T, Hk, D), v
    (T, Hk, Dv). Differentiable once.
    """
    q, k, v = (lower(x) for x in (q, k, v))
    if softcap is None and flash_supports(q, v):
        return docs.flash(q, docs.gathered(k), docs.gathered(v), scale)
    return _DocumentAttention.apply(q, k, v, docs, Scores(scale, softcap))
