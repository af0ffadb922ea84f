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
from torch.autograd.function import once_differentiable

from lorafold.ops.autocast import Exact
from lorafold.ops.operators import operator


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


def _gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return ACTIVATIONS[act].forward(gate).mul_(up)


def _gradients(gy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    known = ACTIVATIONS[act]
    return known.backward(gy * up, gate), known.forward(gate).mul_(gy)


GATED = operator(
    "gated(Tensor gate, Tensor up, str act) -> Tensor",
    _gated,
    lambda gate, up, act: torch.empty_like(gate),
)
BACKWARD = operator(
    "gated_backward(Tensor gy, Tensor gate, Tensor up, str act) -> (Tensor, Tensor)",
    _gradients,
    lambda gy, gate, up, act: (torch.empty_like(gate), torch.empty_like(up)),
)


class _Gated(Exact):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        y: Tensor = GATED(gate, up, act)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *BACKWARD(gy, *ctx.saved_tensors, ctx.act), None


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up (..., k). Differentiable once.

    Args:
        gate, up: the inputs (..., k), of one dtype.
        act: the name of one of ACTIVATIONS.
    """
    return _Gated.apply(gate, up, act)
