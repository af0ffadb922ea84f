"""Outputs that a recomputed checkpoint reuses, and tensors that the layers of a segment share.

    checkpoint(segment, x, use_reentrant=False, context_fn=save_outputs)
    y = saved_for_replay(make)    in the segment: make(); when it is recomputed: the same output
    computed_once(x, (A,), make)  make() for the first layer that reads x with A; its result for all

`saved_for_replay` computes an output again if it was modified in place. `computed_once`, for layers
such as q, k and v, computes the value again if x or A was modified in place, in another segment
(because each must be recomputable alone), and if grad mode changed. The value is cached on x, so
its graph must not reference x: such a cycle would keep x alive.
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
OutputOf = Callable[[Make], Tensor]


_output_of: ContextVar[OutputOf] = ContextVar("output_of", default=lambda make: make())


def saved_for_replay(make: Make) -> Tensor:
    """Returns `make()` (any shape), or, while a segment is recomputed, the output of its forward
    pass.
    """
    return _output_of.get()(make)


class _UsingOutputs(AbstractContextManager[None]):
    """Context manager: `saved_for_replay` calls the function that `start()` returns."""

    def __init__(self, start: Callable[[], OutputOf]) -> None:
        self._start = start

    def __enter__(self) -> None:
        self._token = _output_of.set(self._start())

    def __exit__(self, *_: object) -> None:
        _output_of.reset(self._token)


def save_outputs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Returns the contexts of a segment's forward pass and of its recomputation, for torch's
    `context_fn`.
    """
    outputs = []

    def forward(make: Make) -> Tensor:
        y = make()
        outputs.append((y.detach(), y._version))
        return y

    def replay() -> OutputOf:
        known = iter(outputs)

        def again(make: Make) -> Tensor:
            y, version = next(known)
            return y.detach() if y._version == version else make()

        return again

    return _UsingOutputs(lambda: forward), _UsingOutputs(replay)


def computed_once(x: Tensor, frozen: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
    """Returns the tensor (any shape) that `make` computes from x and the frozen tensors, cached on
    x.
    """
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
    """Returns the running checkpointed segment, identified by its saved-tensor hooks, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else ref(hooks[0])
