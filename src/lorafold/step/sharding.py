"""A model whose large frozen tensors are divided among the processes of a run.

    with sharded(model, processes):
        loss(**inputs).backward()          in every process, as often as in the others

Of each storage a process keeps one part of the bytes. Before a block runs, in the forward and in
the backward, its parts are gathered, and those of the block before are let go: one block is whole
at a time, or the embedding or the head (the scheme of ZeRO, stage 3: Rajbhandari et al. 2020, arXiv
1910.02054). Bytes are divided as they are, so the codes of a quantized base are never cast. A
tensor stays the object that it was and only its storage is emptied and filled: whatever holds it,
a delta, a fused operation or a graph, knows nothing of this.

All processes must run the same blocks in the same order. Trained tensors stay whole in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from lorafold.core.anatomy import bare_modules, blocks, decoder_of, vocabulary_ends
from lorafold.machine.processes import Processes

LEAST = 1 << 14  # bytes of a storage; what is smaller stays whole
UNIT = 64  # bytes that are not parted


@dataclass(frozen=True)
class Sharded:
    """What a model was divided into: the bytes of its large frozen tensors, those of them that a
    process keeps, and those of the largest part of the model that is whole at a time.
    """

    whole: int
    kept: int
    largest: int


class _Shard:
    """A storage, and this process's part of its bytes."""

    def __init__(self, storage: torch.UntypedStorage, processes: Processes) -> None:
        self.storage, self.size = storage, storage.nbytes()
        each = -(-self.size // (processes.count * UNIT)) * UNIT
        first = processes.index * each
        mine = _bytes(storage)[first : first + each]
        self.own = torch.zeros(each, dtype=torch.uint8, device=mine.device)
        self.own[: len(mine)] = mine
        self.padded = each * processes.count

    def fill(self) -> None:
        self.storage.resize_(self.padded)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(_bytes(self.storage), self.own)

    def empty(self) -> None:
        self.storage.resize_(0)


class _Groups:
    """The shards of the parts of a model, of which one part is whole at a time."""

    def __init__(self) -> None:
        self.all: list[list[_Shard]] = []
        self.current: list[_Shard] | None = None

    def add(self, shards: list[_Shard]) -> None:
        for shard in shards:
            shard.empty()
        self.all.append(shards)

    def open(self, shards: list[_Shard]) -> None:
        if shards is self.current:
            return
        self.close()
        for shard in shards:
            shard.fill()
        self.current = shards

    def close(self) -> None:
        for shard in self.current or ():
            shard.empty()
        self.current = None

    def restore(self) -> None:
        self.close()
        for shard in (shard for shards in self.all for shard in shards):
            shard.fill()
            shard.storage.resize_(shard.size)


@contextmanager
def sharded(model: nn.Module, processes: Processes) -> Iterator[Sharded]:
    """Divide the model's large frozen tensors among the processes until the `with` block ends; then
    each has all of them again.

    Args:
        model: With its adapters, the same in every process.
        processes: More than one.
    """
    groups, taken = _Groups(), set[int]()
    ends = vocabulary_ends(model)
    with ExitStack() as stack, torch.no_grad():
        of: dict[str, list[_Shard]] = {}
        for path in [*blocks(model), *ends]:
            found = _storages(model.get_submodule(path), taken)
            # tied ends are one storage
            same = next((of[e] for e in ends if e in of and not found), None)
            of[path] = same if same is not None else [_Shard(s, processes) for s in found]
            if same is None:
                groups.add(of[path])
        _unmap(model)
        for path, shards in of.items():
            _open_for(stack, model.get_submodule(path), groups, shards)
        if len(ends) > 1:  # the loss reads the head itself, once the decoder has run
            _, decoder = decoder_of(model)
            head = of[ends[-1]]
            stack.enter_context(
                decoder.register_forward_hook(lambda *_: groups.open(head))
            )
        sizes = [sum(s.size for s in shards) for shards in groups.all]
        kept = sum(len(s.own) for shards in groups.all for s in shards)
        with torch.enable_grad():
            yield Sharded(sum(sizes), kept, max(sizes, default=0))
        groups.restore()


def _open_for(stack: ExitStack, part: nn.Module, groups: _Groups, shards: list[_Shard]) -> None:
    """Have the shards whole while a module of the part runs, and when its backward begins. It may
    begin inside the part, where another pass read what a block kept, as keys of virtual tokens.
    """

    def before(*_: Any) -> None:
        groups.open(shards)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        for t in tree_iter(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(before)

    for _, module in bare_modules(part):
        for handle in (
            module.register_forward_pre_hook(before), module.register_forward_hook(after)
        ):  # fmt: skip
            stack.callback(handle.remove)


def _storages(module: nn.Module, taken: set[int]) -> list[torch.UntypedStorage]:
    """The storages of the module's large frozen tensors that are not taken, which then are."""
    found = list[torch.UntypedStorage]()
    _unmap(module)
    for t in _frozen(module):
        storage = t.untyped_storage()
        if storage.nbytes() >= LEAST and storage._cdata not in taken:
            taken.add(storage._cdata)
            found.append(storage)
    return found


def _unmap(module: nn.Module) -> None:
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
