"""Requirements of other libraries' kernels on the GPU and on their inputs.

    takes(FLASH, q, v)                      whether the kernel supports these inputs on their device
    with as_on(DeviceKind("cuda")): ...     as if tensors were on such a GPU
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from lorafold.runtime.devices import AMPERE

HALF = (torch.float16, torch.bfloat16)


class Demand(NamedTuple):
    """An attention kernel's dtypes, largest head size and its divisor, and minimum compute
    capability.
    """

    dtypes: tuple[torch.dtype, ...]
    largest_head: int
    head_unit: int
    capability: tuple[int, int]


# Dao 2023, arXiv 2307.08691, as torch builds it
FLASH = Demand(HALF, 256, 8, AMPERE)


class DeviceKind(NamedTuple):
    """A kind of device, and the compute capability (major, minor) of a GPU."""

    kind: str
    capability: tuple[int, int] = AMPERE


def place_of(device: torch.device) -> DeviceKind:
    """The kind of a device of this machine, with its compute capability if it is a CUDA GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return DeviceKind(device.type)
    return DeviceKind("cuda", torch.cuda.get_device_capability(device))


_said: ContextVar[DeviceKind | None] = ContextVar("place", default=None)


@contextmanager
def as_on(place: DeviceKind) -> Iterator[None]:
    """Compute tensors as if they were on another device, in this thread, in the `with` block.
    Estimates use it for devices that this machine lacks.
    """
    token = _said.set(place)
    try:
        yield
    finally:
        _said.reset(token)


def kind_of(x: Tensor) -> str:
    """The kind of device, such as cpu or cuda, whose code paths apply to x (any shape)."""
    place = _said.get()
    return x.device.type if place is None else place.kind


# major versions for which torch has a grouped matmul kernel that reads the sizes on the device; on
# others it loops, and waits for the sizes
GROUPED = (9, 10)
GROUPED_UNIT = 8  # the sides of its 16-bit matrices must be multiples of this


def groups_at_once(x: Tensor) -> bool:
    """Whether one kernel multiplies all groups of rows on the device of x (any shape), so that the
    host need not know their sizes.
    """
    if kind_of(x) != "cuda":
        return False
    place = _said.get()
    major, _ = place.capability if place else torch.cuda.get_device_capability(x.device)
    return major in GROUPED


def takes(demand: Demand, q: Tensor, v: Tensor) -> bool:
    """Whether a kernel supports queries (..., D) and values (..., Dv) of one dtype and device."""
    size, place = q.shape[-1], _said.get()
    return (
        kind_of(q) == "cuda"
        and q.dtype in demand.dtypes
        and size == v.shape[-1] <= demand.largest_head
        and size % demand.head_unit == 0
        and (place.capability if place else torch.cuda.get_device_capability(q.device))
        >= demand.capability
    )
