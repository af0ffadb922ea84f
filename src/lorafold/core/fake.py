"""Fake tensors are torch's tensors with shape, dtype and device but no values. An estimate runs a
step on them to find how much memory it takes (`lorafold.memory`).

An operation that branches on values can't do so on fake tensors, so such code calls `is_fake`.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(x: Tensor) -> bool:
    """Whether x, a tensor of any shape, is a fake tensor."""
    return isinstance(x, FakeTensor)
