"""Counts the bytes of tensors as they are allocated and freed, independent of the memory that the
process has from the operating system; `Traced` has those of one step.

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
from dataclasses import astuple, dataclass
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
            if not isinstance(t, Tensor) or (key := t.untyped_storage()._cdata) in before:
                continue
            if key not in self._alive:
                storage = t.untyped_storage()
                self._alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._leave, key, storage.nbytes())
        return out

    def _leave(self, key: int, n: int) -> None:
        self._alive.discard(key)
        self.now -= n


@dataclass(frozen=True)
class Traced:
    """The bytes that a step takes.

    weights, adapter, optimizer, gradients: The tensors of each.
    ahead: Gradients that exist before the forward pass.
    kept: Activations that exist when the forward pass is done.
    kv_cache: Keys and values of inference.
    engine: What draws completions beside the step, without keys and values.
    slots: Keys and values of completions that are drawn before the step.
    drawing: The peak meanwhile beyond weights, adapter, optimizer and engine.
    forward, backward: The peak in either pass beyond weights, adapter and optimizer. For inference
        these are the forward passes of the prompt and of the token after it.
    late: The same in the second half of the backward pass.
    exchanged: What is gathered from other processes and on its way to them.

    forward_operations, backward_operations are no bytes, but the multiplications and additions of
    either pass in products of matrices.
    """

    weights: int
    adapter: int = 0
    optimizer: int = 0
    gradients: int = 0
    ahead: int = 0
    kept: int = 0
    kv_cache: int = 0
    forward: int = 0
    backward: int = 0
    late: int = 0
    engine: int = 0
    slots: int = 0
    drawing: int = 0
    exchanged: int = 0
    forward_operations: int = 0
    backward_operations: int = 0

    def at(self, other: Traced, blocks: tuple[int, int, int]) -> Traced:
        """Extrapolate to blocks[2] blocks, given that this is for blocks[0] blocks and the other
        for blocks[1].
        """
        a, b, n = blocks
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Traced(*(x + (y - x) * (n - a) // (b - a) for x, y in pairs))
