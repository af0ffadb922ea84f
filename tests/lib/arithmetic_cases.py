"""Every operation that multiplies, with 16-bit tensors for it, and in which dtypes it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorafold.layers import layer_of
from lorafold.ops import cross_entropy
from lorafold.ops.arithmetic import MIN_ROWS, linear
from lorafold.ops.attention import document_attention
from lorafold.ops.cross_entropy import LinearHead, linear_cross_entropy
from lorafold.ops.dropout import Dropped, keep_scale, zero_dropped
from lorafold.ops.frozen import frozen_linear, low_rank_linear
from lorafold.ops.packed_documents import Documents

T, IN, OUT, R = 2 * MIN_ROWS, 48, 40, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


X, W, ONTO, DOWN, UP = (
    random(T, IN, seed=0),
    random(OUT, IN, seed=1),
    random(T, OUT, seed=2),
    random(R, IN, seed=3),
    random(OUT, R, seed=4),
)
Q, K, V = (random(T, heads, 8, seed=5 + heads) for heads in (4, 2, 1))
TARGETS = torch.arange(T) % OUT
WHERE = torch.arange(0, T * IN, 7, dtype=torch.int32)


def dropped(x: Tensor) -> Dropped:
    return Dropped(zero_dropped(x.detach(), WHERE), WHERE, keep_scale(0.1), None, None, set())


# what differentiates, and what does it, for tensors of any dtype
OPS: dict[str, tuple[tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "linear": ((X, W), linear),
    "linear-biased": ((X, W, ONTO[0]), linear),
    "frozen": ((X, ONTO), lambda x, onto: frozen_linear(x, onto, W.to)),
    "frozen-alone": ((X,), lambda x: frozen_linear(x, None, W.to)),
    "low-rank": (
        (X, DOWN.float(), UP.float()),
        lambda x, down, up: low_rank_linear(x, W.to, down, up, None, 1.0),
    ),
    "low-rank-dropped": (
        (X, DOWN.float(), UP.float()),
        lambda x, down, up: low_rank_linear(x, W.to, down, up, dropped(x), 1.0),
    ),
    "attention": (
        (Q, K, V.expand(T, 2, 8)),
        lambda q, k, v: document_attention(q, k, v, Documents((T - 9, 9)), 0.3),
    ),
    "head": (
        (X,),
        lambda x: linear_cross_entropy(x, TARGETS, LinearHead(W.to(x.dtype), None, 1.0, None)) / T,
    ),
    "head-biased": (
        (X,),
        lambda x: (
            linear_cross_entropy(
                x, TARGETS, LinearHead(W.to(x.dtype), ONTO[0].to(x.dtype), 0.5, 3.0)
            )
            / T
        ),
    ),
    "layer": ((X,), lambda x: layer_of(plain(x.dtype))(x)),
    "layer-trained": ((X,), lambda x: layer_of(plain(x.dtype).requires_grad_())(x)),
}


class Products(TorchDispatchMode):
    """The dtypes in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket._qualified_op_name.removeprefix("aten::").rstrip("_") in (
            "mm",
            "addmm",
            "bmm",
            "baddbmm",
        ):
            self.dtypes.add(args[-1].dtype)
        if func is torch.ops.lorafold.linear_cross_entropy.default:
            with self:  # what it multiplies is inside
                return cross_entropy._kernel(*args)
        return func(*args, **(kwargs or {}))


def plain(dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(W)
    linear.bias.copy_(ONTO[0])  # type: ignore[union-attr]
    return linear
