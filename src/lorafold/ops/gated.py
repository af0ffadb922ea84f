"""A gated activation that keeps only its two inputs; the backward computes act(gate) again.

    y = act(gate) * up

Shazeer 2020, arXiv 2002.05202: SwiGLU for silu, GEGLU for gelu. gate, up (..., k). In plain torch,
autograd keeps act(gate) too. The specification is `reference.gated`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Activation(NamedTuple):
    """An elementwise function and its derivative."""

    forward: Callable[[Tensor], Tensor]
    # (gradient of the output, input) -> gradient of the input
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act.forward(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        return ctx.act.backward(gy * up, gate), ctx.act.forward(gate).mul_(gy), None


def gated(gate: Tensor, up: Tensor, act: Activation) -> Tensor:
    """act(gate) * up (..., k). Differentiable once.

    Args:
        gate, up: the inputs (..., k), of one dtype.
        act: one of ACTIVATIONS.
    """
    return _Gated.apply(gate, up, act)
