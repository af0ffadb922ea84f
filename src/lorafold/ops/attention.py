"""Causal attention over packed documents, each of which attends to itself alone.

    o_i = sum_j p_ij v_j,   p_i = softmax_j(cap * tanh(scale * q_i k_j / cap)),   j in document(i),
                            i - window < j <= i

q (T, H, D), k (T, Hk, D), v (T, Hk, Dv) -> (T, H, Dv); query head h reads key head h // (H / Hk)
(grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245). Documents are computed in tiles of
at most TILE queries; no tensor has size T x T, and the backward computes the probabilities again
instead of keeping them. On CUDA in half precision, torch's flash attention (Dao 2023, arXiv
2307.08691) is used instead. Use it where documents are packed without padding. The specification is
`reference.document_attention`.

At SmolLM2-135M's shape (9 heads over 3, D 64, bf16, T = 1024, one CPU thread), forward and
backward: five documents of 140 to 260 tokens take 0.4 of the time of torch's causal kernel over all
1024 tokens, one document of 1024 takes 0.9 of it. Smaller tiles skip more of the masked scores,
larger ones need fewer calls: 128 rather than 256 takes 0.84 of the time for four documents of 256
and 1.03 for the five.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorafold.ops.arithmetic import arithmetic

TILE = 128


class Tile(NamedTuple):
    """Queries lo:hi against keys first:hi of each of n consecutive documents of one length, the
    first of which begins at token `at`.
    """

    at: int
    n: int
    length: int
    lo: int
    hi: int
    first: int

    def cut(self, x_THD: Tensor, lo: int) -> Tensor:
        """The view (n, hi - lo, H, D) of tokens lo:hi of each document."""
        return x_THD[self.at : self.at + self.n * self.length].unflatten(0, (self.n, self.length))[
            :, lo : self.hi
        ]

    def queries(self, x_THD: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        """A copy (n * Hk, G * t, D) of the tile's t queries; the G heads that share a key head
        follow each other.

        Args:
            x_THD: the queries of all documents.
            kv_heads: the number Hk of key heads.
            dtype: the dtype of the copy.
        """
        by_group = self.cut(x_THD, self.lo).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        return by_group.to(dtype, memory_format=torch.contiguous_format).reshape(
            self.n * kv_heads, -1, x_THD.shape[-1]
        )

    def keys(self, x_THD: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy (n * Hk, s, D), in that dtype, of the tile's s keys or values."""
        return (
            self.cut(x_THD, self.first)
            .transpose(1, 2)
            .to(dtype, memory_format=torch.contiguous_format)
            .flatten(0, 1)
        )

    def put_queries(self, x_THD: Tensor, part: Tensor) -> None:
        """Write part (n * Hk, G * t, D), laid out as by `queries`, to its place in x_THD."""
        t, (heads, width) = self.hi - self.lo, x_THD.shape[1:]
        by_group = part.view(self.n, -1, heads * self.n // len(part), t, width)
        self.cut(x_THD, self.lo).copy_(
            by_group.permute(0, 3, 1, 2, 4).reshape(self.n, t, heads, width)
        )

    def add_keys(self, x_THD: Tensor, part: Tensor) -> None:
        """Add part (n * Hk, s, D) to its place in x_THD, since several tiles read one key."""
        self.cut(x_THD, self.first).add_(part.unflatten(0, (self.n, -1)).transpose(1, 2))


@dataclass(frozen=True)
class Documents:
    """The documents in a batch: `lens` are their lengths in tokens, sequence after sequence, with
    sum B * T. With a window, query i sees the keys in (i - window, i].
    """

    lens: tuple[int, ...]
    window: int | None = None
    _masks: dict[tuple[Any, ...], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def flash(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The attention (T, H, D) by the kernel of flash attention, in fp16 or bf16 on CUDA.

        Args:
            q: the queries (T, H, D).
            k, v: the keys and values (T, Hk, D).
            scale: the factor of the scores.
        """
        # This takes over a second to import, and only GPUs need it.
        from torch.nn.attention.varlen import varlen_attn

        starts = (
            torch.tensor([0, *self.lens], dtype=torch.int32)
            .cumsum(0, dtype=torch.int32)
            .to(q.device, non_blocking=True)
        )
        longest, back = max(self.lens), -1 if self.window is None else self.window - 1
        gqa = q.shape[1] != k.shape[1]
        found = varlen_attn(
            q,
            k,
            v,
            starts,
            starts,
            longest,
            longest,
            scale=scale,
            window_size=(back, 0),
            enable_gqa=gqa,
        )
        return found  # type: ignore[return-value]

    def tiles(self) -> Iterator[Tile]:
        """Yield tiles that contain every query once.

        Consecutive documents of equal length share their tiles, so that a batch of documents of one
        length is one batched product.
        """
        at = 0
        for length, equal in groupby(self.lens):
            n = len(list(equal))
            for lo in range(0, length, TILE):
                first = 0 if self.window is None else max(0, lo + 1 - self.window)
                yield Tile(at, n, length, lo, min(length, lo + TILE), first)
            at += n * length

    def mask(self, tile: Tile, groups: int, like: Tensor) -> Tensor:
        """The mask (G * t, s), 0 or -inf, that is added to the scores of a tile's t queries and s
        keys.

        Aligned at the last key, all tiles of t queries have the same mask. So the widest one is
        kept, for all layers of a model, and the others are its last columns.

        Args:
            tile: the tile.
            groups: the number G of heads that share a key head.
            like: a tensor, of any shape, with the mask's dtype and device.
        """
        t, columns, key = (
            tile.hi - tile.lo,
            tile.hi - tile.first,
            (tile.hi - tile.lo, groups, like.dtype, like.device),
        )
        if key not in self._masks or self._masks[key].shape[1] < columns:
            widest = (
                tile.length if self.window is None else min(tile.length, t + self.window - 1)
            )
            i = torch.arange(widest - t, widest, device=like.device)[:, None]
            j = torch.arange(widest, device=like.device)
            hidden = (j > i) if self.window is None else (j > i) | (j <= i - self.window)
            self._masks[key] = (
                like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf")).repeat(groups, 1)
            )
        return self._masks[key][:, -columns:]

    def dense(self, batch: int, device: torch.device) -> Tensor:
        """The whole mask, boolean (B, 1, T, T): True where a query sees a key."""
        lens = torch.tensor(self.lens, device=device)
        document = (
            torch.arange(len(self.lens), device=device)
            .repeat_interleave(lens, output_size=sum(self.lens))
            .view(batch, 1, -1)
        )
        i = torch.arange(document.shape[-1], device=device)
        seen = (document[..., :, None] == document[..., None, :]) & (i[:, None] >= i)
        return seen if self.window is None else seen & (i[:, None] - self.window < i)


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor | None]:
    """q (b, G * t, D), k (b, s, D) -> the probabilities (b, G * t, s), and the tanh that the
    backward of a cap needs.
    """
    if cap is None:
        return torch.softmax(torch.baddbmm(mask, q, k.mT, alpha=scale), -1), None
    t = torch.bmm(q, k.mT).mul_(scale / cap).tanh_()
    return torch.softmax(torch.add(mask, t, alpha=cap), -1), t


class _DocumentAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, docs: Documents, scale: float, cap: float | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.docs, ctx.scale, ctx.cap = docs, scale, cap
        ctx.dtype = dtype = arithmetic(q)
        kv_heads = k.shape[1]
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for tile in docs.tiles():
            qi, ki, vi = tile.queries(q, kv_heads, dtype), tile.keys(k, dtype), tile.keys(v, dtype)
            p, _ = _probabilities(qi, ki, docs.mask(tile, q.shape[1] // kv_heads, qi), scale, cap)
            tile.put_queries(out, torch.bmm(p, vi))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v = ctx.saved_tensors
        kv_heads, dtype = k.shape[1], ctx.dtype
        # several tiles add to a key's gradient, and in bf16 each sum would be rounded
        wide = torch.promote_types(k.dtype, torch.float32)
        gq, gk, gv = (
            torch.empty_like(q),
            torch.zeros_like(k, dtype=wide),
            torch.zeros_like(v, dtype=wide),
        )
        for tile in ctx.docs.tiles():
            qi, gi, ki, vi = (
                tile.queries(q, kv_heads, dtype),
                tile.queries(g, kv_heads, dtype),
                tile.keys(k, dtype),
                tile.keys(v, dtype),
            )
            p, t = _probabilities(
                qi, ki, ctx.docs.mask(tile, q.shape[1] // kv_heads, qi), ctx.scale, ctx.cap
            )
            tile.add_keys(gv, torch.bmm(p.mT, gi))
            # (gp - sum(gp * p)) * p in one pass, the sum in fp32
            gs = torch.ops.aten._softmax_backward_data(torch.bmm(gi, vi.mT), p, -1, p.dtype).mul_(
                ctx.scale
            )
            if t is not None:
                gs.mul_(1 - t * t)
            tile.put_queries(gq, torch.bmm(gs, ki))
            tile.add_keys(gk, torch.bmm(gs.mT, qi))
        return gq, gk.to(k.dtype), gv.to(v.dtype), None, None, None


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, scale: float, softcap: float | None = None
) -> Tensor:
    """Causal attention (T, H, Dv) within each document. Differentiable once.

    Args:
        q: the queries (T, H, D).
        k: the keys (T, Hk, D); Hk divides H.
        v: the values (T, Hk, Dv).
        docs: the documents, with sum(docs.lens) = T.
        scale: the factor of the scores.
        softcap: the cap of the scores, or None.
    """
    half = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if half and softcap is None and q.shape[-1] == v.shape[-1] <= 256:
        return docs.flash(q, k, v, scale)
    return _DocumentAttention.apply(q, k, v, docs, scale, softcap)
