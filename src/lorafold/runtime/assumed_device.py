"""The kind of device whose code paths are used: that of the tensors, or an assumed one in
estimates.

    with assume_device(DeviceKind("cuda")): ...     as if tensors were on such a GPU
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from lorafold.runtime.devices import AMPERE


class DeviceKind(NamedTuple):
    """A type of device, and the compute capability (major, minor) of a GPU."""

    type: str
    capability: tuple[int, int] = AMPERE


def kind_of_device(device: torch.device) -> DeviceKind:
    if device.type != "cuda" or not torch.cuda.is_available():
        return DeviceKind(device.type)
    return DeviceKind("cuda", torch.cuda.get_device_capability(device))


_assumed: ContextVar[DeviceKind | None] = ContextVar("assumed_device", default=None)


@contextmanager
def assume_device(kind: DeviceKind) -> Iterator[None]:
    """Context in which this thread computes as if tensors were on another kind of device. Estimates
    use it for devices that this machine lacks.
    """
    token = _assumed.set(kind)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_type(x: Tensor) -> str:
    """The type of the device, such as cpu or cuda, whose code paths apply to x (any shape)."""
    kind = _assumed.get()
    return x.device.type if kind is None else kind.type


def cuda_capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the GPU of x (any shape), or of the assumed GPU."""
    kind = _assumed.get()
    return kind.capability if kind else torch.cuda.get_device_capability(x.device)
