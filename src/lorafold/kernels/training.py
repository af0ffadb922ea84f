"""Operators of training steps in C++ (`training.cpp`), for fp32 and bf16 on the CPU. Each makes one
pass over memory. For other dtypes or layouts it returns NotImplemented, and the reference
implementation in torch runs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.kernels.compiling import DTYPES, Functions, parameter_types, supported
from lorafold.ops.dropout import names_and_key, threshold

SIGNATURES = {
    "gated_silu": "3P4li",
    "gated_gelu_tanh": "3P4li",
    "gated_silu_backward": "5Pli",
    "gated_gelu_tanh_backward": "5Pli",
    "rms_norm": "2PiP2lfi",
    "rms_norm_backward": "4P2lfi",
    "rotary": "4P11lfi",
    "softmax": "2P4lfi",
    "softmax_backward": "2P2lfi",
    "cross_entropy": "3P2l2f2i",
    "empty": "2Pl",
    "scale": "4P2li",
    "scale_backward": "6P2li",
}
threads = torch.get_num_threads


class _CppTraining:
    def __init__(self) -> None:
        half = "scale", "scale_backward"
        self._call = Functions(Path(__file__).with_suffix(".cpp"), SIGNATURES, half)
        self._places = self._call.library.dropped_places
        self._places.restype, self._places.argtypes = ctypes.c_long, parameter_types("2P2lILIi")

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> Any:
        if not supported(x, dense=True):
            return NotImplemented
        out, n, wide = torch.empty_like(x), len(gain), gain.dtype is not x.dtype
        gain = gain.float() if wide else gain
        rows = x.numel() // n
        self._call("rms_norm", x.dtype, x, gain, wide, out, rows, n, eps, threads())
        return out

    def rms_norm_backward(self, gy: Tensor, x: Tensor, gain: Tensor, eps: float) -> Any:
        gy = gy.contiguous()
        if not supported(x, gy, dense=True):
            return NotImplemented
        out, n, gain = torch.empty_like(x), len(gain), gain.float()
        rows = x.numel() // n
        self._call("rms_norm_backward", x.dtype, gy, x, gain, out, rows, n, eps, threads())
        return out

    def gated(self, gate: Tensor, up: Tensor, act: str) -> Any:
        if act == "gelu" or not supported(gate, up):
            return NotImplemented
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        n = out.shape[-1]
        flat = [t.reshape(-1, n) for t in (gate, up)]
        # inputs without a constant row stride are copied
        rows = [t if t.stride(1) == 1 else t.contiguous() for t in flat]
        parts = (*rows, out, len(rows[0]), n, *(t.stride(0) for t in rows))
        self._call(f"gated_{act}", gate.dtype, *parts, threads())
        return out

    def gated_backward(self, gy: Tensor, gate: Tensor, up: Tensor, act: str) -> Any:
        gy = gy.contiguous()
        if act == "gelu" or not supported(gate, up, gy, dense=True):
            return NotImplemented
        gradients = torch.empty_like(gate), torch.empty_like(up)
        parts = (gy, gate, up, *gradients, gy.numel(), threads())
        self._call(f"gated_{act}_backward", gate.dtype, *parts)
        return gradients

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Any:
        """Takes x (B, H, T, D) or (B, T, H, D), and cos and sin (B or 1, 1, T, D) or (B or 1, T, 1,
        D).
        """
        alike = cos.shape == sin.shape and cos.stride() == sin.stride()
        if x.dim() != 4 or cos.dim() != 4 or not alike or not supported(x, cos, sin):
            return NotImplemented
        out = y = torch.empty_like(x)
        if cos.shape[1] == x.shape[1] and cos.shape[2] == 1:
            x, cos, sin, y = (t.transpose(1, 2) for t in (x, cos, sin, out))
        (b, heads, tokens, d), (turns, axis, *angles) = x.shape, cos.shape
        ends = [t.stride(3) for t in (x, cos, y)]
        # the stride of an axis of length 1 is arbitrary
        packed = tokens == 1 or cos.stride(2) == d
        known = axis == 1 and angles == [tokens, d] and turns in (1, b)
        if ends != [1, 1, 1] or not known or not packed:
            return NotImplemented
        sizes = (b, heads, tokens, d, *x.stride()[:3], *y.stride()[:3])
        turn, sign = cos.stride(0) if turns > 1 else 0, -1.0 if back else 1.0
        self._call("rotary", x.dtype, x, cos, sin, y, *sizes, turn, sign, threads())
        return out

    def softmax_(self, scores: Tensor, mask: Tensor, scale: float) -> Any:
        alike = mask.dtype is scores.dtype and mask.stride(1) == 1
        if not alike or not supported(scores, dense=True):
            return NotImplemented
        n = scores.shape[-1]
        sizes = (scores.numel() // n, len(mask), mask.stride(0), n)
        return self._call("softmax", scores.dtype, scores, mask, *sizes, scale, threads())

    def softmax_backward_(self, gp: Tensor, p: Tensor, scale: float) -> Any:
        if not supported(gp, p, dense=True):
            return NotImplemented
        n = p.shape[-1]
        return self._call("softmax_backward", p.dtype, gp, p, p.numel() // n, n, scale, threads())

    def cross_entropy_(
        self, z: Tensor, targets: Tensor, losses: Tensor, block: Tensor, scale: float,
        cap: float | None, gradient: bool,
    ) -> Any:  # fmt: skip
        known = targets.is_contiguous() and losses.dtype is torch.float32
        if not known or not supported(z, dense=True):
            return NotImplemented
        parts = (z, targets, losses, *z.shape, scale, cap or 0.0, gradient, threads())
        return self._call("cross_entropy", z.dtype, *parts)

    def scale(self, y: Tensor, g: Tensor, c: Tensor | None, onto: Tensor | None) -> Any:
        plain = onto is not None or g.dim() not in (1, 3) or not y.is_contiguous()
        if plain or y.dtype is not torch.bfloat16 or g.dtype is not torch.float32:
            return NotImplemented
        n, out = g.shape[-1], torch.empty_like(y)
        c = torch.zeros_like(g) if c is None else c.float()
        gains, offsets = (t.reshape(-1, n).contiguous() for t in (g, c))
        each = zip(*(t.view(len(gains), -1) for t in (y, out)), gains, offsets, strict=True)
        for rows, out_rows, gain, offset in each:
            sizes = rows.numel() // n, n, threads()
            self._call("scale", y.dtype, rows, gain, offset, out_rows, *sizes)
        return out

    def scale_backward(self, z: Tensor, y: Tensor, g: Tensor, offset: bool) -> Any:
        z = z.contiguous()
        plain = g.dim() != 1 or not supported(z, y, dense=True)
        if plain or y.dtype is not torch.bfloat16 or g.dtype is not torch.float32:
            return NotImplemented
        gradients = torch.empty_like(y), torch.empty_like(g), torch.empty_like(g)
        g = g.contiguous()
        rows, n = y.numel() // len(g), len(g)
        self._call("scale_backward", y.dtype, z, y, g, *gradients, rows, n, threads())
        return gradients

    def dropped_places(self, x: Tensor, p: float, names: Tensor | None, key: int, site: int) -> Any:
        n, width, limit = x.numel(), x.shape[-1], threshold(p)
        if n >= 2**31 or not limit:
            return NotImplemented
        names, key = names_and_key(x, names, key)
        places, names = torch.empty(n, dtype=torch.int32), names.contiguous()
        sizes = (n // width, width, limit)
        many = self._places(places.data_ptr(), names.data_ptr(), *sizes, key, site, threads())
        return places[:many].clone()

    def empty_(self, x: Tensor, where: Tensor) -> Any:
        if x.dtype not in DTYPES or where.dtype is not torch.int32:
            return NotImplemented
        return self._call("empty", x.dtype, x, where, len(where))
