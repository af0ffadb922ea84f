"""Copies tensors from the host to a device, and keeps their values on the host.

    x = send(ids, device)       on a GPU, an asynchronous copy
    on_host(x)                  the values on the CPU; no wait if x was sent and is unchanged
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorafold.ops.autocast import Exact

ON_HOST = "_lorafold_on_host"


def send(x: Tensor, device: torch.device) -> Tensor:
    """Returns x (any shape) copied from the CPU to a device; x itself if it is already there."""
    if x.device.type != "cpu" or device.type == "cpu":
        return x.to(device)
    cuda = device.type == "cuda"
    return _with_host_copy((x.pin_memory() if cuda else x).to(device, non_blocking=cuda), x)


def send_all(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sends tensors of any shapes, by name, to a device."""
    return {name: send(x, device) for name, x in tensors.items()}


def on_host(x: Tensor) -> Tensor:
    """Returns x (any shape) on the CPU. Waits for the device unless x was sent and is unchanged."""
    if x.device.type == "cpu":
        return x
    known = _host_copy(x)
    return x.cpu() if known is None else known


def _with_host_copy(copy: Tensor, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        vars(copy)[ON_HOST] = x, _version(copy)
    return copy


def _host_copy(x: Tensor) -> Tensor | None:
    if torch.compiler.is_compiling():  # in a graph, tensors cannot carry attributes
        return None
    known, version = vars(x).get(ON_HOST, (None, None))
    return known if version == _version(x) else None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # inference tensors have none


def add_int(x: Tensor, n: int) -> Tensor:
    """Returns x + n (any shape), with its value on the host if the value of x is there."""
    known = _host_copy(x)
    return x + n if known is None else _with_host_copy(x + n, known + n)


def select_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns the rows (m, ...) of x (n, ...) with these numbers; a view if they are consecutive,
    and x itself if these are all rows in order.
    """
    if rows and all(i == b for i, b in enumerate(rows, rows[0])):
        return x if len(rows) == len(x) else x[rows[0] : rows[-1] + 1]
    return x.index_select(0, send(torch.tensor(rows, dtype=torch.long), x.device))


class _Rows(Exact):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.shape = x.shape
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (at,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_copy_(0, at, g), None


# the rows (m, ...) of x (n, ...) at places (m,), which must be distinct, because the backward pass
# does not sum gradients
rows_at: Callable[[Tensor, Tensor], Tensor] = _Rows.apply
