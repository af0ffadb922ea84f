"""Operations of the engine's forward pass (`ops.decoding`) in C++ (`decoding.cpp`), for fp32 and
bf16 on the CPU. They are batch-invariant: a row's results do not depend on the other rows of the
batch, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.kernels.compiling import Functions, supported
from lorafold.ops.decoding import SlotFactors, low_rank

SIGNATURES = {"low_rank": "2Pl2P4li", "attend": "5P16lfi"}


class _CppDecoding:
    def __init__(self) -> None:
        self._call = Functions(Path(__file__).with_suffix(".cpp"), SIGNATURES)

    def stored(self, factors: Tensor) -> Any:
        return factors.dtype if supported(factors) else NotImplemented

    def low_rank(self, parts: Sequence[SlotFactors], slots: Tensor) -> Any:
        factors = [t for part in parts for t in part[:2] if t is not None]
        if not supported(*factors) or not all(t.is_contiguous() for t in factors):
            return NotImplemented
        dtype, width = factors[0].dtype, sum(part.width for part in parts)
        call, threads = self._call, torch.get_num_threads()
        ranks = [part.ranks[slots] for part in parts]
        table = torch.zeros(len(parts), 5, dtype=torch.long)
        for row, part, of_rows in zip(table, parts, ranks, strict=True):
            row[2], row[4] = of_rows.data_ptr(), part.width
            if part.down is not None and part.up is not None:
                row[0], row[1] = part.down.data_ptr(), part.up.data_ptr()
                row[3] = part.down.shape[1]

        def product(x: Tensor) -> Tensor:
            if x.dtype is not dtype:
                return low_rank(parts, slots)(x)
            x, (rows, tokens, n) = x.contiguous(), x.shape
            out = x.new_empty(rows, tokens, width)
            call(
                "low_rank", dtype, x, table, len(table), slots, out, rows, tokens, n, width, threads
            )
            return out

        product.keeps = factors, ranks  # type: ignore[attr-defined] # the table has their addresses
        return product

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Any:
        (b, heads, tokens, d), (_, kv, keys, dv) = q.shape, v.shape
        ends = q.stride(3), k.stride(3), v.stride(3), mask.stride(3), k.stride(2), v.stride(2)
        if not supported(q, k, v, mask) or ends != (1, 1, 1, 1, d, dv):
            return NotImplemented
        out = q.new_empty(b, tokens, heads, dv)
        self._call(
            "attend", q.dtype, q, k, v, mask, out, b, heads, tokens, kv, keys, d, dv,
            *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], mask.stride(0), mask.stride(2),
            scale, torch.get_num_threads(),
        )  # fmt: skip
        return out
