"""Outputs kept for the replay of checkpointed segments, and tensors shared by layers within one.

    checkpoint(segment, x, use_reentrant=False, context_fn=selective_context_fn)
    y = kept(make)              inside: make() in the forward pass; in the replay, its output again
    once(x, (A,), make)         make() for the first layer that reads x with A; its result for all

`kept` recomputes an output that was modified in place. `once`, for layers such as q, k and v,
recomputes the value if x or A was modified in place, in another segment (which must be able to
replay alone), and if grad mode changed. The value is cached on x, so its graph must not reference
x, which would keep itself alive.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

Make = Callable[[], Tensor]
Way = Callable[[Make], Tensor]


_way: ContextVar[Way] = ContextVar("kept", default=lambda make: make())


def kept(make: Make) -> Tensor:
    """The output of `make` (any shape); in the replay of a segment, the output of its forward pass.
    """
    return _way.get()(make)


class _By(AbstractContextManager[None]):
    """Uses the `kept` implementation that `way()` returns, in the `with` block."""

    def __init__(self, way: Callable[[], Way]) -> None:
        self._way = way

    def __enter__(self) -> None:
        self._token = _way.set(self._way())

    def __exit__(self, *_: object) -> None:
        _way.reset(self._token)


def selective_context_fn() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a segment's forward pass and of its replays, for torch's `context_fn`."""
    outputs = []

    def forward(make: Make) -> Tensor:
        y = make()
        outputs.append((y.detach(), y._version))
        return y

    def replay() -> Way:
        known = iter(outputs)

        def again(make: Make) -> Tensor:
            y, version = next(known)
            return y.detach() if y._version == version else make()

        return again

    return _By(lambda: forward), _By(replay)


def once(x: Tensor, frozen: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
    """The tensor (any shape) that `make` computes from x and the frozen tensors, cached on x."""
    # inference tensors have no version counter
    if torch.compiler.is_compiling() or any(t.is_inference() for t in (x, *frozen)):
        return make()
    versions = [t._version for t in (x, *frozen)]
    state = versions, running_segment(), torch.is_grad_enabled()
    known = vars(x).setdefault("_lorafold_once", {})
    value = known.get(frozen)
    if value is None or value[0] != state:
        known[frozen] = value = state, make()
    return value[1]


def running_segment() -> ReferenceType[Any] | None:
    """The running checkpointed segment, identified by its saved-tensor hooks, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else ref(hooks[0])
