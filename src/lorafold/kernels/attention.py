"""Attention within documents in C++ (`attention.cpp`): one call for all documents of a layer.

Matmuls are in fp32, which is as fast as 16 bits for such small matrices, or in bf16 with AMX.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.core.contexts import is_fake
from lorafold.kernels.compiling import Functions, supported
from lorafold.ops.attention import Scores
from lorafold.ops.packed_documents import Documents

SIZES = "P7l2P3fi"  # parameters from the table of documents on
SIGNATURES = {"attend": f"4P{SIZES}", "attend_backward": f"9P{SIZES}"}


class _CppAttention:
    def __init__(self) -> None:
        self._call = Functions(Path(__file__).with_suffix(".cpp"), SIGNATURES)

    def document_attention(
        self, q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores
    ) -> Any:
        if not supported(q, k, v) or any(x.stride(-1) != 1 for x in (q, k, v)):
            return NotImplemented
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        self._attend("attend", (q, k, v), (q, k, v, out), docs, scores)
        return out

    def document_attention_backward(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, docs: Documents, scores: Scores
    ) -> Any:
        if not supported(q, k, v, g) or any(x.stride(-1) != 1 for x in (q, k, v, g)):
            return NotImplemented
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        parts, keys = _parts(docs, q, k), sum(docs.lens)
        each = [
            x.new_empty(keys, k.shape[1], parts, x.shape[2], dtype=torch.float32) for x in (k, v)
        ]
        pointers = (g.contiguous(), q, k, v, *gradients, *each)
        self._attend("attend_backward", (q, k, v), pointers, docs, scores)
        return gradients

    def _attend(
        self, name: str, qkv: tuple[Tensor, ...], pointers: tuple[Tensor, ...], docs: Documents,
        scores: Scores,
    ) -> None:  # fmt: skip
        q, k, v = qkv
        if is_fake(q):
            return
        strides = torch.tensor([s for x in qkv for s in x.stride()[:2]])
        window = float("inf") if docs.window is None else docs.window
        self._call(
            name, q.dtype, *pointers, docs.table, len(docs.table), q.shape[1], k.shape[1],
            q.shape[2], v.shape[2], _parts(docs, q, k), len(k), docs.keys, strides, window,
            scores.scale, scores.cap or 0.0, torch.get_num_threads(),
        )  # fmt: skip


def _parts(docs: Documents, q: Tensor, k: Tensor) -> int:
    """Returns the number of parts into which the queries of one key head are divided, so that all
    threads have work.
    """
    few = len(docs.lens) * k.shape[1] < 2 * torch.get_num_threads()
    return q.shape[1] // k.shape[1] if few else 1
