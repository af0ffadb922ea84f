"""Convolutions as matrices.

    y[o, t] = sum_{c, k} W[o, c, k] x[c, stride t + dilation k - padding] + b[o]
    x (N, in, *places), W (out, in / groups, *window), y (N, out, *places')

As a matrix, W is (out, in / groups * prod(window)). A low-rank update is a convolution to r
channels followed by one with window 1; with groups, it is a single convolution with up @ down. A
delta's output is added in fp32 and rounded with a dither (`core.rounding`).
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.core.layer import BaseLayer
from lorafold.core.rounding import rounded
from lorafold.errors import NotMergeable
from lorafold.ops.autocast import autocasting, lowered
from lorafold.ops.dropout import dropout
from lorafold.ops.scale_and_add import plain_scale_and_add

# by the number of spatial dimensions
FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(BaseLayer):
    """A convolution over one, two or three dimensions: weight (out, in / groups, *window)."""

    takes_vectors = False
    called = staticmethod(lowered)

    @property
    def kernel(self) -> Tensor:  # (out, in / groups, *window)
        """The stored weight. Raises NotMergeable if the module computes it from other parameters.
        """
        if "weight" not in self.module._parameters:
            raise NotMergeable(
                f"{type(self.module).__name__}: the weight is computed from other parameters"
                " (weight norm or another parametrization), expected a stored weight; remove the"
                " parametrization, or leave the module out of the targets"
            )
        return self.bare.weight

    @property
    def shape(self) -> tuple[int, int]:
        out, *columns = self.kernel.shape
        return out, prod(columns)

    @property
    def window(self) -> int:  # type: ignore[override]
        return prod(self.bare.kernel_size)

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        y: Tensor
        if autocasting(x) or x.dtype is self.kernel.dtype:
            y = self.run(x)
        else:
            b = None if self.bias is None else self.bias.to(x.dtype)
            y = self.bare._conv_forward(x, self.kernel.to(x.dtype), b)
        if onto is None:
            return y
        return rounded(y.to(torch.promote_types(y.dtype, torch.float32)) + onto, y.dtype)

    def op(self, x: Tensor, m: Tensor) -> Tensor:
        """Returns x (N, in, *places) convolved with m (k, in / groups * prod(window)): (N, k,
        *places'). With groups, k must be out.
        """
        kernel = m.to(x.dtype).reshape(len(m), -1, *self.bare.kernel_size)
        return self.bare._conv_forward(x, kernel, None)

    def branch(self, x: Tensor, down: Tensor, up: Tensor, p: float) -> Tensor:
        if self.bare.groups > 1:
            return self.op(self.drop(x, p), up @ down)
        u = self.op(self.drop(x, p), down)
        places = len(self.bare.kernel_size)
        return FUNCTIONS[places](u, up.to(u.dtype).reshape(*up.shape, *(1,) * places))

    def drop(self, x: Tensor, p: float) -> Tensor:
        return dropout(x, p) if p else x

    def each(self, v: Tensor) -> Tensor:
        return v.view(-1, *(1,) * len(self.bare.kernel_size))

    def scale(
        self, y: Tensor, g: Tensor, c: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        return plain_scale_and_add(y, self.each(g), None if c is None else self.each(c), onto)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        return self.kernel.flatten(1), self.bias

    def encode(self, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
        return super().encode(w.reshape(self.kernel.shape), b)
