"""Counts the bytes of tensors as they are allocated and freed, independent of the memory that the
process has from the operating system.

    with Ledger() as ledger: ...
    ledger.now, ledger.peak          bytes of the tensors made inside the block that still exist;
                                     the most of them at any time
    ledger.operations                multiplications and additions of products of matrices

It sees every tensor that torch makes, through torch's dispatcher, so it counts fake tensors as well
as real ones. It does not see memory that a kernel allocates and frees within a single operation.
Bytes are those of torch's storages (the memory behind a tensor and its views).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
DEVICE = torch.ops.prim.device.default  # the operation that fake tensors run most often
# of products a b: which argument is a (..., m, k), before b (..., k, n)
PRODUCTS = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten._grouped_mm.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.addmm_.default, aten.baddbmm.default), 1),
}


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors of any shapes; memory that several share counts once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


class Ledger(TorchDispatchMode):
    """Counts the tensors that are made inside its `with` block, in bytes: `now` and `peak`; and the
    operations of products of matrices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:
            return args[0].fake_device
        if func.is_view:
            return func(*args, **(kwargs or {}))
        before = {
            t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        if (first := PRODUCTS.get(func)) is not None:
            self.operations += 2 * args[first].numel() * args[first + 1].shape[-1]
        for t in tree_iter(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in before:
                self._enter(t)
        return out

    def _enter(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        if (key := storage._cdata) in self._alive:
            return
        self._alive.add(key)
        self.now += (n := storage.nbytes())
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, n)

    def _leave(self, key: int, n: int) -> None:
        self._alive.discard(key)
        self.now -= n
