"""What kernels of other libraries demand of a GPU and of their inputs.

    takes(FLASH, q, v)            whether the kernel takes these inputs on the card that they are on
    with as_card((8, 0)): ...     as if each card had this compute capability

A path that uses a kernel asks here first, so that every card takes one that exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Demand(NamedTuple):
    """What a kernel of attention takes: the dtypes, the largest head size and what divides it, and
    the least compute capability of the GPU.
    """

    dtypes: tuple[torch.dtype, ...]
    largest_head: int
    head_unit: int
    capability: tuple[int, int]


# Dao 2023, arXiv 2307.08691, as torch builds it
FLASH = Demand(HALF, 256, 8, (8, 0))


_card: ContextVar[tuple[int, int] | None] = ContextVar("card", default=None)


@contextmanager
def as_card(capability: tuple[int, int]) -> Iterator[None]:
    """Let each card have this compute capability, major and minor, until the `with` block ends, in
    this thread. An estimate is of a card that may be elsewhere.
    """
    token = _card.set(capability)
    try:
        yield
    finally:
        _card.reset(token)


def capability_of(device: torch.device) -> tuple[int, int]:
    """The compute capability, major and minor, of a CUDA device."""
    return _card.get() or torch.cuda.get_device_capability(device)


def takes(demand: Demand, q: Tensor, v: Tensor) -> bool:
    """Whether a kernel takes queries (..., D) and values (..., Dv), of one dtype and device."""
    size = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype in demand.dtypes
        and size == v.shape[-1] <= demand.largest_head
        and size % demand.head_unit == 0
        and capability_of(q.device) >= demand.capability
    )
