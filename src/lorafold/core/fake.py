"""Fake tensors, torch's own: shapes, dtypes and devices without values, on which a step runs to see
what it would hold in memory (`lorafold.memory`).

What an operation decides by a value it can't decide there, so such code asks this one question.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: Tensor) -> bool:
    """Is this a tensor without values?"""
    return isinstance(x, FakeTensor)
