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

from lorafold.core.stacked import Stack
from lorafold.ops.nf4 import BLOCK_OF_CONSTANTS


class Held(ABC):
    """Abstract: the matrices (E, out, in) of one parameter of experts."""

    quantized = False

    def __init__(self, stack: Stack) -> None:
        self.parameter: Any = stack.owner._parameters[stack.name]
        self.transposed = bool(stack.owner.is_transposed)

    @property
    @abstractmethod
    def stored_shape(self) -> torch.Size:
        """The shape of the matrices as they are stored, (E, out, in) or (E, in, out)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""

    @abstractmethod
    def stored(self, e: int) -> Tensor:
        """The matrix of expert e as it is stored, (out, in) or (in, out), in `dtype`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        e, *sides = self.stored_shape
        out, inn = reversed(sides) if self.transposed else sides
        return e, out, inn

    def turned(self, w: Tensor) -> Tensor:
        """Matrices (..., out, in) from stored ones or the reverse, a view of any shape."""
        return w.mT if self.transposed else w

    def matrix(self, e: int) -> Tensor:
        """The matrix (out, in) of expert e."""
        return self.turned(self.stored(e))

    def dense(self) -> Tensor:
        """All matrices (E, out, in)."""
        return self.turned(torch.stack([self.stored(e) for e in range(self.stored_shape[0])]))


class Floats(Held):
    """Matrices in floating point."""

    @property
    def stored_shape(self) -> torch.Size:
        shape: torch.Size = self.parameter.shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.parameter.dtype
        return dtype

    def stored(self, e: int) -> Tensor:
        matrix: Tensor = self.parameter[e]
        return matrix

    def dense(self) -> Tensor:
        return self.turned(self.parameter)


class NF4(Held):
    """Matrices in 4-bit codes of bitsandbytes, with the constants of all experts in one list."""

    quantized = True

    @property
    def _state(self) -> Any:
        return self.parameter.quant_state

    @property
    def stored_shape(self) -> torch.Size:
        shape: torch.Size = self._state.shape
        return shape

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._state.dtype
        return dtype

    def stored(self, e: int) -> Tensor:
        state, ops = self._state, torch.ops.bitsandbytes
        shape = self.stored_shape[1:]
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


class Int8(Held):
    """Matrices in 8 bits, with a scale for each of their stored rows."""

    quantized = True
    dtype = torch.bfloat16

    @property
    def stored_shape(self) -> torch.Size:
        shape: torch.Size = self.parameter.shape
        return shape

    def stored(self, e: int) -> Tensor:
        scale = self.parameter.SCB.view(self.stored_shape[:2])[e]
        return (self.parameter.data[e] * (scale / 127)[:, None]).to(self.dtype)


def held(stack: Stack) -> Held:
    """How a stack's parameter stores its matrices."""
    parameter: nn.Parameter = stack.owner._parameters[stack.name]  # type: ignore[assignment]
    if hasattr(parameter, "quant_state"):
        return NF4(stack)
    return Int8(stack) if parameter.dtype is torch.int8 else Floats(stack)
