"""Tensors with shapes and no values, on which operations run to see what they would hold in memory (`lorafold.memory`).

What an operation decides by a value it can't decide there; the two questions below are all that such code may ask.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def valueless(x: Tensor) -> bool:
    return isinstance(x, FakeTensor)


def holds(condition: Tensor) -> bool:
    """A condition of one element; True where there are no values to compare, as for a model that is what it seems to be."""
    return valueless(condition) or bool(condition)
