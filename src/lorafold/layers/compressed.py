"""Linear layers that were quantized before training, in the formats of other tools.

    W[i, j] = (codes[i, j] - z[i // r, j // c]) s[i // r, j // c]        W (out, in)

    codes   float8_e4m3fn (out, in); int8 (out, in); or 4 or 8 bits each, packed into int32
            (out, ceil(in bits / 32)) from the low bits on, each plus half its range
    s       the scales (ceil(out / r), ceil(in / c)) of blocks of r rows and c columns
    z       the zero points of asymmetric codes, of the same shape; packed along the rows

The formats are float-quantized, int-quantized and pack-quantized of compressed-tensors (vLLM
project), and DeepSeek-V3's fine-grained FP8 (arXiv 2412.19437, section 3.3), with scales
`weight_scale_inv`. Activations are never quantized, because a folded delta would then differ from
the delta itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorafold.layers.bitsandbytes import Quantized, make_linear
from lorafold.ops.float8 import values

WORD = 32  # bits of an int32


@dataclass(frozen=True)
class QuantizationFormat:
    """How a matrix is stored.

    kind: float or int.
    rows, columns: the block that shares a scale; 0 for all.
    scale: the name of the scales' parameter.
    """

    kind: str
    rows: int
    columns: int
    bits: int = 8
    packed: bool = False
    symmetric: bool = True
    scale: str = "weight_scale"

    def blocks(self, out: int, inn: int) -> tuple[int, int]:
        """The shape of the scales of a matrix (out, in)."""
        return -(-out // (self.rows or out)), -(-inn // (self.columns or inn))

    def parameters(self, out: int, inn: int, scales: torch.dtype) -> dict[str, Tensor]:
        """The uninitialized parameters that store a matrix (out, in), by name."""
        high, wide = self.blocks(out, inn)
        shape = (1,) if (self.rows, self.columns) == (0, 0) else (high, wide)
        tensors = {self.scale: torch.empty(shape, dtype=scales)}
        if self.packed:
            tensors["weight_packed"] = torch.empty(out, words(inn, self.bits), dtype=torch.int32)
            tensors["weight_shape"] = torch.empty(2, dtype=torch.int64)
        else:
            dtype = torch.float8_e4m3fn if self.kind == "float" else torch.int8
            tensors["weight"] = torch.empty(out, inn, dtype=dtype)
        if not self.symmetric:
            tensors["weight_zero_point"] = (
                torch.empty(words(high, self.bits), wide, dtype=torch.int32)
                if self.packed
                else torch.empty(shape, dtype=torch.int8)
            )
        return tensors


def words(n: int, bits: int) -> int:
    """The number of int32 that contain n codes."""
    return -(-n * bits // WORD)


def unpacked(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first n codes of each row, int8 (rows, n)."""
    codes = packed.contiguous().view(torch.uint8)
    if bits == 4:  # both codes of a byte, each in a byte of an int16
        pairs = codes.to(torch.int16)
        codes = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    return codes[:, :n].view(torch.int8) - (1 << bits - 1)


class CompressedLinear(nn.Module):
    """A linear whose weight is stored in a `QuantizationFormat`, with the parameter names of the
    files.
    """

    def __init__(self, linear: nn.Linear, codes: QuantizationFormat, scales: torch.dtype) -> None:
        """Make the uninitialized module for a linear, with its bias, on its device."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.codes = codes
        self.compute_dtype: torch.dtype | None = None
        with linear.weight.device:
            tensors = codes.parameters(self.out_features, self.in_features, scales)
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Like any module, but codes and scales keep their dtypes."""
        quantized = {id(p) for name, p in self._parameters.items() if name != "bias"}

        def apart(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if id(t) not in quantized or moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(apart, recurse)

    def freeze(self) -> None:
        """Disable gradients of codes and scales, which loading turns into ordinary parameters."""
        for name, parameter in self._parameters.items():
            if name != "bias" and parameter is not None:
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) W^T + b: (..., out)."""
        return Compressed(self)(x)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self.codes.kind}{self.codes.bits}"


class Compressed(Quantized):
    @property
    def dtype(self) -> torch.dtype:
        scale = getattr(self.bare, self.bare.codes.scale)
        return scale.dtype

    def dequantized(self) -> Tensor:  # (out, in)
        module, codes = self.bare, self.bare.codes
        scale = getattr(module, codes.scale)
        if codes.packed:
            integers = unpacked(module.weight_packed, codes.bits, self.shape[1])
        else:
            integers = values(module.weight) if codes.kind == "float" else module.weight
        w = integers.to(scale.dtype)
        if not codes.symmetric:
            zero = module.weight_zero_point  # the shape of the scales, packed along the rows
            if codes.packed:
                zero = unpacked(zero.t(), codes.bits, codes.blocks(*self.shape)[0]).t()
            w = _by_block(w, zero.to(scale.dtype), codes, torch.sub)
        return _by_block(w, scale, codes, torch.mul)

    def dequantize(self) -> None:
        module, weight, bias = self.module, self.weight(), self.bias
        module._parameters.clear()
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        module._parameters["bias"] = bias  # type: ignore[assignment]
        for attribute in ("codes", "compute_dtype"):
            module.__dict__.pop(attribute)
        make_linear(module)


def _by_block(w: Tensor, by: Tensor, codes: QuantizationFormat, operation: Any) -> Tensor:
    """w (out, in), in place, with the value of its block applied to each element."""
    out, inn = w.shape
    rows, columns = codes.rows or out, codes.columns or inn
    high, wide = codes.blocks(out, inn)
    by = by.view(high, wide)
    if out % rows or inn % columns:  # the last blocks are smaller
        spread = by.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inn]
        operation(w, spread, out=w)
        return w
    blocks = w.view(high, rows, wide, columns)
    operation(blocks, by[:, None, :, None], out=blocks)
    return w
