"""Outputs that a checkpointed segment keeps, because they are dear to compute and cheap to hold.

    checkpoint(segment, x, use_reentrant=False, context_fn=keeping)
    y = kept(make)              inside: make() in the forward, and in the replay its output again

Outside such a segment `kept` is make() alone. An output that was written to in between is computed
again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar

from torch import Tensor

Make = Callable[[], Tensor]
Way = Callable[[Make], Tensor]


def _made(make: Make) -> Tensor:
    return make()


_way: ContextVar[Way] = ContextVar("kept", default=_made)


def kept(make: Make) -> Tensor:
    """The output of `make`, of any shape; in the replay of a segment, that of its forward."""
    return _way.get()(make)


class _By(AbstractContextManager[None]):
    """Takes outputs in the way that `way` gives at each start, until the `with` block ends."""

    def __init__(self, way: Callable[[], Way]) -> None:
        self._way = way

    def __enter__(self) -> None:
        self._token = _way.set(self._way())

    def __exit__(self, *_: object) -> None:
        _way.reset(self._token)


def keeping() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a segment's forward and of its replays, for torch's checkpointing."""
    outputs: list[tuple[Tensor, int]] = []

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
