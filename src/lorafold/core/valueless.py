"""Tensors with shapes and no values, on which operations run to see what they would hold in memory
(`lorafold.memory`).

What an operation decides by a value it can't decide there; the two questions below are all that
such code may ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")


def valueless(x: Tensor) -> bool:
    return isinstance(x, FakeTensor)


def telling(steps: Iterable[T], x: Tensor) -> list[T]:
    """Of a loop's steps over x those to be run: all, but where there are no values the last three,
    which tell what it holds if each step holds what the one before it does, or more, and the last
    may be cut short.
    """
    return list(steps)[-3:] if valueless(x) else list(steps)
