"""How a parameter of experts stores its matrices.

    Floats      a parameter (E, out, in), or (E, in, out) where the module is transposed
    NF4         the same in 4-bit codes of bitsandbytes (`ops.nf4`), 4.13 bits a weight
    Int8        the same in 8 bits, with one scale for each row as it is stored

A matrix of quantized codes is dequantized alone, for each use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.bases.bitsandbytes import PACKERS
from lorafold.core.stacked import Stack
from lorafold.ops.nf4 import BLOCK_OF_CONSTANTS


class Held(ABC):
    """Abstract: the matrices (E, out, in) of one parameter of experts."""

    quantized = False

    def __init__(self, stack: Stack) -> None:
        owner: Any = stack.owner
        self.parameter: Any = owner._parameters[stack.name]
        self.number, self.transposed = int(owner.num_experts), bool(owner.is_transposed)
        self.compute_dtype: torch.dtype | None = owner.__dict__.get("compute_dtype")

    @property
    @abstractmethod
    def sides(self) -> tuple[int, int]:
        """The shape of a matrix as it is stored, (out, in) or (in, out)."""

    @abstractmethod
    def stored(self, e: int) -> Tensor:
        """The matrix of expert e as it is stored, (out, in) or (in, out)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        a, b = self.sides
        return (self.number, b, a) if self.transposed else (self.number, a, b)

    def turned(self, w: Tensor) -> Tensor:
        """Matrices (..., out, in) from stored ones or the reverse, a view of any shape."""
        return w.mT if self.transposed else w

    def matrix(self, e: int) -> Tensor:
        """The matrix (out, in) of expert e."""
        return self.turned(self.stored(e))

    @abstractmethod
    def dense(self) -> Tensor:
        """All matrices (E, out, in), in the dtype of computation."""


class Floats(Held):
    """Matrices in floating point."""

    @property
    def sides(self) -> tuple[int, int]:
        _, a, b = self.parameter.shape
        return a, b

    def stored(self, e: int) -> Tensor:
        matrix: Tensor = self.parameter[e]
        return matrix

    def dense(self) -> Tensor:
        return self.turned(self.parameter)


class Codes(Held):
    """Abstract: matrices in codes."""

    quantized = True

    def dense(self) -> Tensor:
        matrices = [self.stored(e).to(self.compute_dtype) for e in range(self.number)]
        return self.turned(torch.stack(matrices))


class NF4(Codes):
    """Matrices in 4-bit codes of bitsandbytes, with the constants of all experts in one list."""

    @property
    def _state(self) -> Any:
        return self.parameter.quant_state

    @property
    def sides(self) -> tuple[int, int]:
        rows, b = self._state.shape
        return rows // self.number, b

    def stored(self, e: int) -> Tensor:
        state, ops = self._state, torch.ops.bitsandbytes
        shape = self.sides
        size = prod(shape)
        codes = self.parameter.data.view(-1)[e * size // 2 : (e + 1) * size // 2]
        count = size // state.blocksize
        first, end = e * count, (e + 1) * count
        constants = state.absmax[first:end]
        if state.nested:
            of, skipped = state.state2, first % BLOCK_OF_CONSTANTS
            start = first - skipped
            scales = of.absmax[start // BLOCK_OF_CONSTANTS : -(-end // BLOCK_OF_CONSTANTS)]
            constants = (
                ops.dequantize_blockwise.default(
                    state.absmax[start:end], scales, of.code, of.blocksize, of.dtype
                )[skipped:]
                + state.offset
            )
        # flat where a row is no multiple of a block, as in `bases.bitsandbytes`
        flat = shape if shape[1] % state.blocksize == 0 else (size,)
        matrix: Tensor = ops.dequantize_4bit.default(
            codes[:, None], constants, state.blocksize, state.quant_type, flat, state.dtype
        )
        return matrix.view(shape)


class Int8(Codes):
    """Matrices in 8 bits, with a scale for each of their stored rows."""

    @property
    def sides(self) -> tuple[int, int]:
        rows, b = self.parameter.shape
        return rows // self.number, b

    def stored(self, e: int) -> Tensor:
        a, _ = self.sides
        at = slice(e * a, (e + 1) * a)
        scale = self.parameter.SCB[at] / 127
        return (self.parameter.data[at] * scale[:, None]).bfloat16()


def held(stack: Stack) -> Held:
    """How a stack's parameter stores its matrices."""
    parameter: nn.Parameter = stack.owner._parameters[stack.name]  # type: ignore[assignment]
    if hasattr(parameter, "quant_state"):
        return NF4(stack)
    return Int8(stack) if parameter.dtype is torch.int8 else Floats(stack)


def quantized(w: Tensor, quantization: str) -> nn.Parameter:
    """The parameter that stores w, in bf16, as nf4 or int8: that of a linear (E a, b).

    Args:
        w: the matrices as they are stored, (E, a, b).
        quantization: nf4 or int8.
    """
    parameter: nn.Parameter = PACKERS[quantization](w.flatten(0, 1)).weight  # type: ignore[assignment]
    return parameter
