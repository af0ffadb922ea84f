"""Storage formats of expert weights. Quantized matrices are dequantized one at a time, for each
use.

    FloatExperts    a parameter (E, out, in), or (E, in, out) if transposed, or 2-D if flat
    NF4             the same in bitsandbytes' 4-bit codes, 4.13 bits per weight
    Int8            the same in 8 bits, with one scale for each stored row
    MXFP4           parameters `..._blocks` and `..._scales`, 4.25 bits per weight (`ops.mxfp4`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.core.expert_matrices import Matrices
from lorafold.layers.bitsandbytes import block_constants, dequantized_4bit
from lorafold.ops.mxfp4 import dequantize

BLOCKS, SCALES = "_blocks", "_scales"  # suffixes of MXFP4's parameters
MXFP4_GROUP = 32  # weights that share a scale of MXFP4


class ExpertMatrices(ABC):
    """Abstract: the matrices (E, out, in) of one expert parameter."""

    quantized = False
    suffixes: tuple[str, ...] = ("",)  # suffixes of the parameters' names, the matrices' first

    def __init__(self, matrices: Matrices) -> None:
        owner = matrices.owner
        self.names = [matrices.name + suffix for suffix in self.suffixes]
        self.parameter: Any = owner._parameters[self.names[0]]
        self.number, self.transposed = matrices.number, matrices.stored.transposed
        self.flat = matrices.stored.flat
        self.compute_dtype: torch.dtype | None = owner.__dict__.get("compute_dtype")

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices, after dequantization if they are quantized."""

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, int]:
        """The stored shape of a matrix, (out, in) or (in, out)."""

    @abstractmethod
    def stored(self, e: int) -> Tensor:
        """Returns the matrix of expert e as stored, (out, in) or (in, out)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (E, out, in)."""
        a, b = self.stored_shape
        return (self.number, b, a) if self.transposed else (self.number, a, b)

    def transpose(self, w: Tensor) -> Tensor:
        """Converts stored matrices to (..., out, in) or back, as a view."""
        return w.mT if self.transposed else w

    def as_stored(self, w: Tensor) -> Tensor:
        """Returns all matrices (E, out, in) in the shape of the parameter."""
        return self.transpose(w).flatten(0, 1) if self.flat else self.transpose(w)

    def matrix(self, e: int) -> Tensor:
        """Returns the matrix (out, in) of expert e."""
        return self.transpose(self.stored(e))

    @abstractmethod
    def dense(self) -> Tensor:
        """Returns all matrices (E, out, in), in `dtype`."""

    def dense_like(self) -> Tensor:
        """Returns a tensor like `dense` (E, out, in) on the meta device."""
        return self.transpose(
            torch.empty(self.number, *self.stored_shape, dtype=self.dtype, device="meta")
        )


class FloatExperts(ExpertMatrices):
    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def stored_shape(self) -> tuple[int, int]:
        b = self.parameter.shape[-1]
        return self.parameter.numel() // (self.number * b), b

    @property
    def _matrices(self) -> Tensor:  # (E, a, b)
        w = self.parameter
        return w.unflatten(0, (self.number, -1)) if self.flat else w

    def stored(self, e: int) -> Tensor:
        return self._matrices[e]

    def dense(self) -> Tensor:
        return self.transpose(self._matrices)


class QuantizedMatrices(ExpertMatrices):
    quantized = True

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or torch.bfloat16

    def dense(self) -> Tensor:
        w = torch.empty(
            self.number, *self.stored_shape, dtype=self.dtype, device=self.parameter.device
        )
        for e in range(self.number):
            w[e] = self.stored(e)
        return self.transpose(w)


class NF4(QuantizedMatrices):
    @property
    def stored_shape(self) -> tuple[int, int]:
        rows, b = self.parameter.quant_state.shape
        return rows // self.number, b

    @property
    def _codes(self) -> Tensor:  # (bytes, 1)
        return self.parameter.data.view(-1).view(torch.uint8)[:, None]

    def dense(self) -> Tensor:
        state = self.parameter.quant_state
        w = dequantized_4bit(self._codes, block_constants(state), state, tuple(state.shape))
        return self.transpose(w.view(self.number, *self.stored_shape).to(self.dtype))

    def stored(self, e: int) -> Tensor:
        state, size = self.parameter.quant_state, prod(self.stored_shape)
        blocks = size // state.blocksize
        constants = block_constants(state, slice(e * blocks, (e + 1) * blocks))
        codes = self._codes[e * size // 2 : (e + 1) * size // 2]
        return dequantized_4bit(codes, constants, state, self.stored_shape)


class Int8(QuantizedMatrices):
    @property
    def stored_shape(self) -> tuple[int, int]:
        rows, b = self.parameter.shape
        return rows // self.number, b

    def stored(self, e: int) -> Tensor:
        a, _ = self.stored_shape
        at = slice(e * a, (e + 1) * a)
        return (self.parameter.data[at] * (self.parameter.SCB[at] / 127)[:, None]).bfloat16()


class MXFP4(QuantizedMatrices):
    suffixes = (BLOCKS, SCALES)

    def __init__(self, matrices: Matrices) -> None:
        super().__init__(matrices)
        self.scales: Any = matrices.owner._parameters[self.names[1]]

    @property
    def stored_shape(self) -> tuple[int, int]:
        _, out, groups, _ = self.parameter.shape
        inn = groups * MXFP4_GROUP
        return (inn, out) if self.transposed else (out, inn)

    def stored(self, e: int) -> Tensor:
        return self.transpose(dequantize(self.parameter[e], self.scales[e], self.dtype))


def stored_matrices(matrices: Matrices) -> ExpertMatrices:
    if matrices.name + BLOCKS in matrices.owner._parameters:
        return MXFP4(matrices)
    parameter: nn.Parameter = matrices.owner._parameters[matrices.name]  # type: ignore[assignment]
    if hasattr(parameter, "quant_state"):
        return NF4(matrices)
    return Int8(matrices) if parameter.dtype is torch.int8 else FloatExperts(matrices)


def mxfp4_parameters(matrices: Matrices) -> dict[str, nn.Parameter]:
    """Returns the uninitialized parameters (E, out, in / 32, 16) and (E, out, in / 32), by name,
    that would store floating-point matrices in MXFP4; in / 32 is rounded down.
    """
    floats = FloatExperts(matrices)
    number, out, inn = floats.shape
    shape = (number, out, inn // MXFP4_GROUP)
    return {
        matrices.name + ending: nn.Parameter(
            torch.empty(full, dtype=torch.uint8, device=floats.parameter.device),
            requires_grad=False,
        )
        for ending, full in ((BLOCKS, (*shape, MXFP4_GROUP // 2)), (SCALES, shape))
    }


def quantize_experts(w: Tensor, pack: Callable[[Tensor], nn.Module]) -> nn.Parameter:
    """Returns the parameter with the quantized codes of w (E, a, b)."""
    linear: Any = pack(w.flatten(0, -2))
    return linear.weight
