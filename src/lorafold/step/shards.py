"""The large tensors of a model as they are divided among processes (`step.sharding`): frozen ones
by their bytes, trained ones by who owns them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafold.core.anatomy import bare_modules, blocks, vocabulary_ends
from lorafold.machine.processes import Processes

LEAST = 1 << 14  # bytes of a tensor; what is smaller stays whole
UNIT = 64  # bytes that are not parted


class Parted:
    """A storage, and this process's part of its bytes."""

    def __init__(self, storage: torch.UntypedStorage, processes: Processes) -> None:
        self.storage, self.size = storage, storage.nbytes()
        each = -(-self.size // (processes.count * UNIT)) * UNIT
        first = processes.index * each
        mine = _bytes(storage)[first : first + each]
        self.own = torch.zeros(each, dtype=torch.uint8, device=mine.device)
        self.own[: len(mine)] = mine
        self.padded, self.kept = each * processes.count, each

    def fill(self) -> None:
        """Gather all bytes, in all processes at once."""
        self.storage.resize_(self.padded)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(_bytes(self.storage), self.own)

    def empty(self) -> None:
        """Keep this process's part alone."""
        self.storage.resize_(0)

    def reduce_gradient(self) -> None:
        """Nothing: what is frozen has no gradient."""


class Owned:
    """A trained parameter, and the process that keeps it."""

    def __init__(self, p: nn.Parameter, owner: int, processes: Processes) -> None:
        if p.untyped_storage().nbytes() != p.nbytes or not p.untyped_storage().resizable():
            p.data = p.detach().clone()  # a part of a larger one, or of a file
        self.p, self.owner, self.mine = p, owner, owner == processes.index
        self.storage, self.size = p.untyped_storage(), p.nbytes
        self.kept = self.size if self.mine else 0
        self.learned = False  # whether it had a gradient here in this step

    def fill(self) -> None:
        """Get it from its owner, in all processes at once."""
        self.storage.resize_(self.size)
        dist.broadcast(_bytes(self.storage), self.owner)

    def empty(self) -> None:
        """Let it go where it is another's."""
        if not self.mine:
            self.storage.resize_(0)

    def reduce_gradient(self) -> None:
        """Add the gradients of all to the owner's."""
        self.learned |= self.p.grad is not None
        grad = torch.zeros_like(self.p) if self.p.grad is None else self.p.grad.contiguous()
        dist.reduce(grad, self.owner)
        self.p.grad = grad if self.mine else None


def parts_of(model: nn.Module) -> list[str]:
    """The paths of what is whole at a time: the blocks, and the ends of the vocabulary."""
    return [*blocks(model), *vocabulary_ends(model)]


def owners(model: nn.Module, count: int) -> dict[nn.Parameter, int]:
    """The process, of so many, that owns each large trained weight of the base: the largest first,
    each goes to the one that has least.
    """
    taken, loads = set[nn.Parameter](), [0] * count
    found = [p for path in parts_of(model) for p in trained_in(model.get_submodule(path), taken)]
    chosen: dict[nn.Parameter, int] = {}
    for p in sorted(found, key=lambda p: -p.nbytes):
        chosen[p] = loads.index(min(loads))
        loads[chosen[p]] += p.nbytes
    return chosen


def trained_in(module: nn.Module, taken: set[nn.Parameter]) -> list[nn.Parameter]:
    """The module's large trained parameters that are not taken, which then are."""
    found = list[nn.Parameter]()
    for _, one in bare_modules(module):
        for p in one._parameters.values():
            if p is not None and p.requires_grad and p.nbytes >= LEAST and p not in taken:
                taken.add(p)
                found.append(p)
    return found


def storages_of(module: nn.Module, taken: set[int]) -> list[torch.UntypedStorage]:
    """The storages of the module's large frozen tensors that are not taken, which then are."""
    found = list[torch.UntypedStorage]()
    unmap(module)
    for t in _frozen(module):
        storage = t.untyped_storage()
        if storage.nbytes() >= LEAST and storage._cdata not in taken:
            taken.add(storage._cdata)
            found.append(storage)
    return found


def unmap(module: nn.Module) -> None:
    """Copy what is mapped from a file, which can't be emptied: a file stays mapped as long as
    anything is.
    """
    copies = dict[int, torch.UntypedStorage]()
    for t in _frozen(module):
        if not (storage := t.untyped_storage()).resizable():
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = storage.clone()
            place = t.storage_offset(), t.size(), t.stride()
            t.data = torch.empty(0, dtype=t.dtype).set_(copies[storage.data_ptr()], *place)


def _frozen(part: nn.Module) -> Iterator[Tensor]:
    """The frozen tensors of a part of a model, those of the state of quantized ones among them."""
    for _, module in bare_modules(part):
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for t in held:
            if isinstance(t, Tensor) and not t.requires_grad:
                yield from _inside(t)


def _inside(t: Tensor) -> Iterator[Tensor]:
    yield t
    left: list[Any] = [*vars(t).values()]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif type(value).__module__.startswith("bitsandbytes."):
            left += vars(value).values()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage (n,), which it shares."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
