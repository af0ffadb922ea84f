"""The elementwise parts of a block, each of which saves only its inputs for the backward pass.

    rms_norm   y = x r g,   r = (mean(x^2) + eps)^-1/2      x (..., d), g (d,); in fp32
               gx = r (g gy) - x r^3 mean(g gy x)
    gated      y = act(gate) * up                           gate, up (..., k)
    rotary     y = x cos + rotate(x) sin,   rotate([a, b]) = [-b, a]        x (..., T, D)

Root mean square normalization: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4. Gated
activations: Shazeer 2020, arXiv 2002.05202, SwiGLU for silu, GEGLU for gelu. Rotary position
embedding: Su et al. 2021, arXiv 2104.09864, in the layout of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafold.ops.autocast import Exact, at_least_fp32
from lorafold.ops.operators import operator


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _normed(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, gain.dtype)
    return F.rms_norm(x.to(wide), gain.shape, gain.to(wide), eps).to(x.dtype)


def _norm_gradient(gy: Tensor, x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = at_least_fp32(x)
    xw = x.to(wide)
    squares = torch.linalg.vector_norm(xw, dim=-1, keepdim=True).square_()
    r = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    gx = gy.to(wide) * gain
    along = torch.linalg.vecdot(gx, xw).unsqueeze(-1).mul_(r**3 / x.shape[-1])
    return gx.mul_(r).addcmul_(xw, along, value=-1).to(x.dtype)


NORM = operator("rms_norm(Tensor x, Tensor gain, float eps) -> Tensor", _normed, _like_first)
NORM_BACKWARD = operator(
    "rms_norm_backward(Tensor gy, Tensor x, Tensor gain, float eps) -> Tensor",
    _norm_gradient,
    lambda gy, x, gain, eps: torch.empty_like(x),
)


class _RMSNorm(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.eps = eps
        return NORM(x, gain, eps)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        return NORM_BACKWARD(gy, *ctx.saved_tensors, ctx.eps), None, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Returns x (..., d), normalized and multiplied by the frozen gain (d,), in x's dtype."""
    if x.is_cuda and x.dtype is gain.dtype:
        return F.rms_norm(x, gain.shape, gain, eps)  # one kernel, which also saves only x
    return _RMSNorm.apply(x, gain, eps)


class Activation(NamedTuple):
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


def _gate_gradients(gy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    known = ACTIVATIONS[act]
    return known.backward(gy * up, gate), known.forward(gate).mul_(gy)


GATED = operator("gated(Tensor gate, Tensor up, str act) -> Tensor", _gated, _like_first)
GATED_BACKWARD = operator(
    "gated_backward(Tensor gy, Tensor gate, Tensor up, str act) -> (Tensor, Tensor)",
    _gate_gradients,
    lambda gy, gate, up, act: (torch.empty_like(gate), torch.empty_like(up)),
)


class _Gated(Exact):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return GATED(gate, up, act)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        return *GATED_BACKWARD(gy, *ctx.saved_tensors, ctx.act), None


# act(gate) * up, both (..., k) and of one dtype; act is a key of ACTIVATIONS
gated: Callable[[Tensor, Tensor, str], Tensor] = _Gated.apply


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    (a, b), (sin_a, sin_b) = x.chunk(2, -1), sin.chunk(2, -1)
    of_b, of_a, sign = (sin_b, sin_a, 1) if back else (sin_a, sin_b, -1)
    y = torch.mul(x, cos)
    ya, yb = y.chunk(2, -1)
    ya.addcmul_(b, of_b, value=sign)
    yb.addcmul_(a, of_a, value=-sign)
    return y


ROTARY = operator(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _rotated, _like_first
)


class _Rotary(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return ROTARY(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        return ROTARY(gy, *ctx.saved_tensors, True), None, None


# x cos + rotate(x) sin, in the shape, dtype and layout of x (..., T, D), with D even; cos and sin,
# which get no gradients, broadcast to x
rotary: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotary.apply
