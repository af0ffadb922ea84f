"""The shards of a model's large tensors, and the distribution of optimizer state (ZeRO stage 1;
Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves

from lorafold.core.anatomy import Anatomy
from lorafold.runtime.processes import Processes

MIN_BYTES = 1 << 14  # smaller tensors stay whole
ALIGNMENT = 64  # of each process's part, in bytes
ALIASES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class Moments:
    """The process that updates each replicated parameter and keeps its moments. All processes
    update a parameter that is not assigned to one.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._of: dict[nn.Parameter, int] = {}

    def assign_owners(self, parameters: Iterable[nn.Parameter]) -> None:
        self._of = balanced(parameters, self.processes.count)

    def is_owner(self, p: nn.Parameter) -> bool:
        return self._of.get(p, self.processes.index) == self.processes.index

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Context in which an optimizer sees only this process's parameters. On exit, all processes
        receive the updated parameters.
        """
        had_gradient = [p for p in self._of if p.grad is not None]
        others = {p: p.grad for p in had_gradient if not self.is_owner(p)}
        for p in others:
            p.grad = None
        yield
        for p, grad in others.items():
            p.grad = grad
        for owner in range(self.processes.count):
            self.processes.same([p.detach() for p in had_gradient if self._of[p] == owner], owner)


def balanced(parameters: Iterable[nn.Parameter], count: int) -> dict[nn.Parameter, int]:
    """Assigns a process to each parameter: the largest first, to the process with the fewest bytes.
    """
    loads, owner_of = [0] * count, dict[nn.Parameter, int]()
    for p in sorted(parameters, key=lambda p: -p.nbytes):
        owner_of[p] = loads.index(min(loads))
        loads[owner_of[p]] += p.nbytes
    return owner_of


class ByteShard:
    """A storage whose bytes are split over processes."""

    def __init__(
        self, storage: torch.UntypedStorage, processes: Processes, content: Tensor | None = None
    ) -> None:
        self.storage, self.size = storage, storage.nbytes()
        each = -(-self.size // (processes.count * ALIGNMENT)) * ALIGNMENT
        self._index, self.padded, self.kept = processes.index, each * processes.count, each
        self.part = torch.zeros(each, dtype=torch.uint8, device=storage.device)
        self._keep(_bytes(storage) if content is None else content)
        self.whole = True
        self.written = False  # whether an operation wrote to it since it was gathered

    def _keep(self, content: Tensor) -> None:
        first = self._index * self.kept
        own_bytes = content[first : min(first + self.kept, self.size)]
        self.part[: len(own_bytes)] = own_bytes

    def fill(self) -> None:
        """Gathers all bytes; all processes must call this together."""
        self.storage.resize_(self.padded)
        self.whole = True
        all_bytes = _bytes(self.storage)
        if all_bytes.is_cuda:
            gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
            gather(all_bytes, self.part)
            return
        for index, part in enumerate(all_bytes.split(self.kept)):  # gloo gathers into a copy
            if index == self._index:
                part.copy_(self.part)
            dist.broadcast(part, index)

    def empty(self) -> None:
        """Frees the storage; this process keeps its part of the bytes."""
        if self.written:
            self._keep(_bytes(self.storage))
        self.storage.resize_(0)
        self.whole = self.written = False

    def restore(self) -> None:
        """Gathers all bytes, and removes the padding."""
        if not self.whole:
            self.fill()
        self.storage.resize_(self.size)

    def move_to_owner(self, owner: int, processes: Processes) -> None:
        """Moves all bytes to the owner; the storages of the other processes are empty."""
        if self.whole:
            self.empty()
        is_owner = owner == processes.index
        self.storage.resize_(self.padded if is_owner else 0)
        parts = [*_bytes(self.storage).split(self.kept)] if is_owner else None
        dist.gather(self.part, parts, owner)
        self.storage.resize_(self.size if is_owner else 0)

    def reduce_gradient(self) -> None:
        """Does nothing, because a frozen tensor has no gradient."""


class OwnedParameter:
    """A trained parameter that only its owner process keeps."""

    def __init__(
        self, p: nn.Parameter, owner: int, processes: Processes, before: ByteShard | None = None
    ) -> None:
        if before is not None and before.size == p.nbytes:
            before.move_to_owner(owner, processes)
        elif before is not None:
            before.restore()
        storage = p.untyped_storage()
        if storage.nbytes() not in (0, p.nbytes) or not storage.resizable():
            p.data = p.detach().clone()  # it was a view, or mapped from a file
        self.p, self.owner, self.is_owner = p, owner, owner == processes.index
        self.storage, self.size = p.untyped_storage(), p.nbytes
        self.kept = self.size if self.is_owner else 0
        self.had_gradient = False  # whether it had a gradient here in this step
        self.whole, self.written = True, False

    def fill(self) -> None:
        """Broadcasts the parameter from its owner; all processes must call this together."""
        self.storage.resize_(self.size)
        self.whole = True
        dist.broadcast(_bytes(self.storage), self.owner)

    def empty(self) -> None:
        """Frees the storage in every process except the owner, whose copy is up to date because all
        processes make the same writes.
        """
        if not self.is_owner:
            self.storage.resize_(0)
        self.whole = self.written = False

    def reduce_gradient(self) -> None:
        """Sums the gradients of all processes in the owner."""
        self.had_gradient |= self.p.grad is not None
        if self.p.grad is None:
            self.p.grad = torch.zeros_like(self.p, dtype=self.p.grad_dtype)
        grad = self.p.grad.contiguous()
        dist.reduce(grad, self.owner)
        self.p.grad = grad if self.is_owner else None


Shard = ByteShard | OwnedParameter


class ShardedReads(TorchDispatchMode):
    """Mode in which operations see full tensors: a sharded tensor is gathered while an operation
    uses it, so all processes must run the same operations in the same order. The operations in
    ALIASES, which state dicts use, do not gather: copy a tensor before you use its address.
    """

    def __init__(self, shards: Mapping[int, Shard]) -> None:
        super().__init__()
        self.shards = shards
        self.filled: list[Shard] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.shards and func not in ALIASES:
            self._fill([shard for t in tree_leaves((args, kwargs)) if (shard := self._of(t))])
            if func._schema.is_mutable:
                for declared, t in zip(func._schema.arguments, args, strict=False):
                    written = declared.alias_info is not None and declared.alias_info.is_write
                    if written and (shard := self._of(t)):
                        shard.written = True
        return func(*args, **kwargs)

    def _of(self, value: Any) -> Shard | None:
        if not isinstance(value, Tensor) or value.is_meta or not torch._C._has_storage(value):
            return None
        return self.shards.get(value.untyped_storage()._cdata)

    def _fill(self, needed: list[Shard]) -> None:
        missing = [shard for shard in dict.fromkeys(needed) if not shard.whole]
        if missing:
            self.empty_filled(needed)
        for shard in missing:
            shard.fill()
        self.filled += missing

    def empty_filled(self, but: Sequence[Shard] = ()) -> None:
        """Empties the shards that this mode filled, except those in `but`."""
        for shard in self.filled:
            if shard not in but:
                shard.empty()
        self.filled = [shard for shard in self.filled if shard in but]


def shard_tensor(
    t: Tensor, known: MutableMapping[int, Shard], processes: Processes, device: torch.device
) -> None:
    """Shards a large frozen tensor of any shape, and the quantization state of a quantized tensor.
    The storages move to `device`.
    """
    for one in _with_state(t):
        storage, content = one.untyped_storage(), None
        resizable = storage.resizable()
        if storage._cdata in known or (storage.nbytes() if resizable else one.nbytes) < MIN_BYTES:
            continue
        if not resizable or one.device != device:
            if not one.is_contiguous():
                continue
            content = one.detach().view(-1).view(torch.uint8)
            storage = torch.UntypedStorage(one.nbytes, device=device)
            place = 0, one.size(), one.stride()
            one.data = torch.empty(0, dtype=one.dtype, device=device).set_(storage, *place)
        shard = known[storage._cdata] = ByteShard(storage, processes, content)
        shard.empty()


def gathered_parts(model: nn.Module) -> list[str]:
    """The paths of the parts that are gathered one at a time: the blocks, the embedding and the
    head.
    """
    anatomy = Anatomy.of(model)
    return [*anatomy.blocks, *anatomy.vocabulary_ends]


def owners(model: nn.Module, count: int) -> dict[nn.Parameter, int]:
    taken, parts = set[nn.Parameter](), map(model.get_submodule, gathered_parts(model))
    return balanced([p for part in parts for p in large_trained_parameters(part, taken)], count)


def large_trained_parameters(module: nn.Module, taken: set[nn.Parameter]) -> list[nn.Parameter]:
    """The module's large trained parameters that are not yet in `taken`, to which they are added.
    """
    params = (p for _, one in Anatomy.of(module).modules for p in one._parameters.values())
    large = (p for p in params if p is not None and p.requires_grad and p.nbytes >= MIN_BYTES)
    trained = [*dict.fromkeys(p for p in large if p not in taken)]
    taken.update(trained)
    return trained


def frozen_shards(
    module: nn.Module, known: Mapping[int, Shard], taken: set[int], processes: Processes
) -> list[Shard]:
    """The shards of the module's large frozen tensors that are not yet in `taken`, to which their
    storages are added.
    """
    shards = list[Shard]()
    copy_mapped(module)
    for t in _frozen(module):
        storage = t.untyped_storage()
        shard = known.get(storage._cdata)
        if storage._cdata in taken or (shard is None and storage.nbytes() < MIN_BYTES):
            continue
        taken.add(storage._cdata)
        shards.append(ByteShard(storage, processes) if shard is None else shard)
    return shards


def copy_mapped(module: nn.Module) -> None:
    """Copies tensors that are mapped from a file, because a mapped storage can't be emptied."""
    copies = dict[int, torch.UntypedStorage]()
    for t in _frozen(module):
        if not (storage := t.untyped_storage()).resizable():
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = storage.clone()
            place = t.storage_offset(), t.size(), t.stride()
            t.data = torch.empty(0, dtype=t.dtype).set_(copies[storage.data_ptr()], *place)


def gather_around(stack: ExitStack, part: nn.Module, gather_part: Callable[[], None]) -> None:
    """Gathers a part of the model before any of its modules runs, and when the backward pass, which
    may begin inside the part, reaches an output of any of them.
    """

    def before(*_: Any) -> None:
        gather_part()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        for t in tree_iter(output):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(before)

    for _, module in Anatomy.of(part).modules:
        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)


def _frozen(part: nn.Module) -> Iterator[Tensor]:
    """The frozen tensors of a part of a model, and the quantization state of quantized ones."""
    for _, module in Anatomy.of(part).modules:
        for t in _of(module):
            if not t.requires_grad:
                yield from _with_state(t)


def storage_ids(model: nn.Module) -> set[int]:
    tensors = (t for module in model.modules() for t in _of(module))
    return {one.untyped_storage()._cdata for t in tensors for one in _with_state(t)}


def _of(module: nn.Module) -> Iterator[Tensor]:
    held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return (t for t in held if isinstance(t, Tensor))


def _with_state(t: Tensor) -> Iterator[Tensor]:
    yield t
    pending = [*vars(t).values()]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif type(value).__module__.startswith("bitsandbytes."):
            pending += vars(value).values()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage, (n,), as a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
