"""The operations of `lorafold.engine.operations` in C++ (`decode.cpp`), compiled for this processor
when they are first needed, in a second, and kept in the cache.

A row's numbers are the same bits whatever rows are beside it. What is not on the CPU, or neither
float32 nor bfloat16, is computed by `Plain`. The products with the factors of 16 adapters of rank
16 on every linear of SmolLM2 take 6.5 ms a step in bf16, where reading their 156 MB takes 5 (two
cores of an AMD EPYC, Zen 5).
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.engine.operations import Operations, Part, Plain, Product
from lorafold.errors import LorafoldError
from lorafold.kernels.compiling import Unavailable, loaded
from lorafold.kernels.rows import gated_parts, rotary_parts

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode.cpp")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
P, N, INT, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "low_rank": [P, P, N, P, P, N, N, N, N, INT],
    "attend": [P] * 5 + [N] * 16 + [F, INT],
    "write": [P] * 4 + [N] * 9,
    "rms_norm": [P] * 3 + [N] * 2 + [F, INT],
    "rotary": [P] * 4 + [N] * 11 + [INT],
    "gated_silu": [P] * 3 + [N] * 4 + [INT],
    "gated_gelu_tanh": [P] * 3 + [N] * 4 + [INT],
}


class Native(Operations):
    """In C++, on the CPU. Raises Unavailable where they can't be compiled."""

    independent = frozenset({"low_rank", "attend", "write", "rms_norm", "rotary", "gated"})

    def __init__(self) -> None:
        found = loaded(SOURCE)
        self._plain = Plain()
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        for name, parameters in SIGNATURES.items():
            for dtype, suffix in DTYPES.items():
                function = getattr(found, f"{name}_{suffix}")
                function.restype, function.argtypes = None, parameters
                self._functions[name, dtype] = function

    def stored(self, factors: Tensor) -> torch.dtype:
        return factors.dtype if self._takes(factors) else self._plain.stored(factors)

    def low_rank(self, parts: Sequence[Part], slots: Tensor) -> Product:
        factors = [t for part in parts for t in part[:2] if t is not None]
        if not self._takes(*factors) or not all(t.is_contiguous() for t in factors):
            return self._plain.low_rank(parts, slots)
        dtype, width = factors[0].dtype, sum(part.width for part in parts)
        function, threads = self._functions["low_rank", dtype], torch.get_num_threads()
        ranks = [part.ranks[slots] for part in parts]
        table = torch.zeros(len(parts), 5, dtype=torch.long)
        for row, part, found in zip(table, parts, ranks, strict=True):
            row[2], row[4] = found.data_ptr(), part.width
            if part.down is not None and part.up is not None:
                row[0], row[1] = part.down.data_ptr(), part.up.data_ptr()
                row[3] = part.down.shape[1]

        def product(x: Tensor) -> Tensor:
            if x.dtype is not dtype:
                return self._plain.low_rank(parts, slots)(x)
            x, (rows, tokens, n) = x.contiguous(), x.shape
            out = x.new_empty(rows, tokens, width)
            function(
                x.data_ptr(), table.data_ptr(), len(table), slots.data_ptr(), out.data_ptr(), rows,
                tokens, n, width, threads,
            )  # fmt: skip
            return out

        product.keeps = factors, ranks  # type: ignore[attr-defined] # the table has their addresses
        return product

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        (b, heads, tokens, d), (_, kv, keys, dv) = q.shape, v.shape
        ends = q.stride(3), k.stride(3), v.stride(3), mask.stride(3), k.stride(2), v.stride(2)
        if not self._takes(q, k, v, mask) or ends != (1, 1, 1, 1, d, dv):
            return self._plain.attend(q, k, v, mask, scale)
        out = q.new_empty(b, tokens, heads, dv)
        self._functions["attend", q.dtype](
            q.data_ptr(), k.data_ptr(), v.data_ptr(), mask.data_ptr(), out.data_ptr(), b, heads,
            tokens, kv, keys, d, dv, q.stride(0), q.stride(1), q.stride(2), k.stride(0),
            k.stride(1), v.stride(0), v.stride(1), mask.stride(0), mask.stride(2), scale,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def write(self, buffer: Tensor, x: Tensor, slots: Tensor, starts: Tensor) -> None:
        if not self._takes(buffer, x) or x.stride(3) != 1:
            return self._plain.write(buffer, x, slots, starts)
        b, heads, tokens, d = x.shape
        self._functions["write", x.dtype](
            buffer.data_ptr(), x.data_ptr(), slots.data_ptr(), starts.data_ptr(), b, heads, tokens,
            d, buffer.stride(0), buffer.stride(1), x.stride(0), x.stride(1), x.stride(2),
        )  # fmt: skip
        return None

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        if not self._takes(x, gain):
            return self._plain.rms_norm(x, gain, eps)
        x = x.contiguous()
        out, n = torch.empty_like(x), x.shape[-1]
        self._call("rms_norm", x, gain, out, x.numel() // n, n, eps)
        return out

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        if not self._takes(x, cos, sin) or (parts := rotary_parts(x, cos, sin, out)) is None:
            return self._plain.rotary(x, cos, sin)
        self._call("rotary", *parts)
        return out

    def gated(self, gate: Tensor, up: Tensor, act: str) -> Tensor:
        if act == "gelu" or not self._takes(gate, up):
            return self._plain.gated(gate, up, act)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        self._call(f"gated_{act}", *gated_parts(gate, up, out))
        return out

    def _call(self, name: str, x: Any, *parts: Any) -> None:
        """Call a function of x's dtype, whose last argument is the number of threads."""
        given = (p.data_ptr() if isinstance(p, Tensor) else p for p in (x, *parts))
        self._functions[name, x.dtype](*given, torch.get_num_threads())

    def _takes(self, *tensors: Tensor) -> bool:
        dtype = tensors[0].dtype
        return dtype in DTYPES and all(t.dtype is dtype and t.is_cpu for t in tensors)


def compiled() -> Native:
    """The operations, compiled if they are not in the cache. Raises Unavailable without a C++
    compiler, OpenMP, or a cache that can be written.
    """
    found = _made()
    if isinstance(found, Native):
        return found
    raise Unavailable(found)


def available() -> Operations:
    """The operations in C++ where they can be compiled, else in torch; the log says why not."""
    found = _made()
    if isinstance(found, Native):
        return found
    log.info("the engine's operations run in torch: %s", found)
    return Plain()


@cache
def _made() -> Native | str:
    """The operations, or why they can't be had; it is found out once a process."""
    try:
        return Native()
    except LorafoldError as error:
        return str(error)
