"""Linear layers that were quantized before training, in the formats of other tools.

    W[i, j] = (codes[i, j] - z[i // r, j // c]) s[i // r, j // c]        W (out, in)

    codes   float8_e4m3fn (out, in); int8 (out, in); or 4 or 8 bits each, packed into int32
            (out, ceil(in bits / 32)) from the low bits on, with half the range added
    s       the scales (ceil(out / r), ceil(in / c)) of blocks of r rows and c columns
    z       the zero points of asymmetric codes, of the same shape; packed along the rows if
            the codes are

The formats are float-quantized, int-quantized and pack-quantized of compressed-tensors (vLLM
project), and DeepSeek-V3's fine-grained FP8 (arXiv 2412.19437, section 3.3), with scales
`weight_scale_inv`. Activations are never quantized, because a merged layer would then differ from
the layer with its delta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorafold.layers.bitsandbytes import Quantized, make_linear
from lorafold.ops.float8 import to_fp32

WORD = 32  # bits of an int32


@dataclass(frozen=True)
class QuantizationFormat:
    """The storage format of a quantized matrix.

    code_type: float or int.
    rows, columns: the size of the blocks that share a scale; 0 for all rows or columns.
    scale: the name of the parameter with the scales.
    """

    code_type: str
    rows: int
    columns: int
    bits: int = 8
    packed: bool = False
    symmetric: bool = True
    scale: str = "weight_scale"

    def blocks(self, out: int, inn: int) -> tuple[int, int]:
        """Returns the shape of the scales of a matrix (out, in)."""
        return -(-out // (self.rows or out)), -(-inn // (self.columns or inn))

    def parameters(self, out: int, inn: int, scales: torch.dtype) -> dict[str, Tensor]:
        """Returns the uninitialized parameters, by name, that store a matrix (out, in)."""
        blocks = self.blocks(out, inn)
        shape = (1,) if (self.rows, self.columns) == (0, 0) else blocks
        tensors = {self.scale: torch.empty(shape, dtype=scales)}
        if self.packed:
            tensors["weight_packed"] = torch.empty(out, num_ints(inn, self.bits), dtype=torch.int32)
            tensors["weight_shape"] = torch.empty(2, dtype=torch.int64)
        else:
            dtype = torch.float8_e4m3fn if self.code_type == "float" else torch.int8
            tensors["weight"] = torch.empty(out, inn, dtype=dtype)
        if not self.symmetric:
            tensors["weight_zero_point"] = (
                torch.empty(num_ints(blocks[0], self.bits), blocks[1], dtype=torch.int32)
                if self.packed
                else torch.empty(shape, dtype=torch.int8)
            )
        return tensors


def num_ints(n: int, bits: int) -> int:
    return -(-n * bits // WORD)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Returns the first n codes of each row, int8 (rows, n)."""
    codes = packed.contiguous().view(torch.uint8)
    if bits == 4:  # both codes of a byte, each in a byte of an int16
        pairs = codes.to(torch.int16)
        codes = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    return codes[:, :n].view(torch.int8) - (1 << bits - 1)


class CompressedLinear(nn.Module):
    """A linear layer whose weight is stored in a `QuantizationFormat`, with the parameter names of
    checkpoint files.
    """

    def __init__(self, linear: nn.Linear, fmt: QuantizationFormat, scales: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.fmt = fmt
        self.compute_dtype: torch.dtype | None = None
        with linear.weight.device:
            tensors = fmt.parameters(self.out_features, self.in_features, scales)
        for name, value in tensors.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Applies `fn` as in any module, except that codes and scales keep their dtypes."""
        quantized = {id(p) for name, p in self._parameters.items() if name != "bias"}

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if id(t) not in quantized or moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def freeze(self) -> None:
        """Disables gradients of codes and scales, which loading turns into ordinary parameters."""
        for name, parameter in self._parameters.items():
            if name != "bias" and parameter is not None:
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (..., in) W^T + b: (..., out)."""
        return Compressed(self)(x)

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, {self.fmt.code_type}{self.fmt.bits}"
        )


class Compressed(Quantized):
    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.bare, self.bare.fmt.scale).dtype

    def dequantized(self) -> Tensor:  # (out, in)
        module, fmt = self.bare, self.bare.fmt
        scale = getattr(module, fmt.scale)
        if fmt.packed:
            integers = unpack(module.weight_packed, fmt.bits, self.shape[1])
        else:
            integers = to_fp32(module.weight) if fmt.code_type == "float" else module.weight
        w = integers.to(scale.dtype)
        if not fmt.symmetric:
            zero = module.weight_zero_point  # the shape of the scales, packed along the rows
            if fmt.packed:
                zero = unpack(zero.t(), fmt.bits, fmt.blocks(*self.shape)[0]).t()
            w = _apply_by_block(w, zero.to(scale.dtype), fmt, torch.sub)
        return _apply_by_block(w, scale, fmt, torch.mul)

    def dequantize(self) -> None:
        module, weight, bias = self.module, self.weight(), self.bias
        module._parameters.clear()
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        module._parameters["bias"] = bias  # type: ignore[assignment]
        for attribute in ("fmt", "compute_dtype"):
            module.__dict__.pop(attribute)
        make_linear(module)


def _apply_by_block(w: Tensor, values: Tensor, fmt: QuantizationFormat, operation: Any) -> Tensor:
    """Applies the operation in place to each element of w (out, in) and the value of its block."""
    out, inn = w.shape
    rows, columns = fmt.rows or out, fmt.columns or inn
    row_blocks, column_blocks = fmt.blocks(out, inn)
    values = values.view(row_blocks, column_blocks)
    if out % rows or inn % columns:  # the last blocks are smaller
        spread = values.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :inn]
        operation(w, spread, out=w)
        return w
    blocks = w.view(row_blocks, rows, column_blocks, columns)
    operation(blocks, values[:, None, :, None], out=blocks)
    return w
