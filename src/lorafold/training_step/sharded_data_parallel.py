"""Data parallelism with large tensors sharded over processes (ZeRO stage 3; Rajbhandari et al.
2020, arXiv 1910.02054).

Each block is gathered before it runs, and the previous block is freed. A frozen tensor is split by
bytes, so quantized codes are never cast. A trained weight has one owner process, which also keeps
its gradient and moments. Tensor objects stay the same; only their storages are emptied and filled.
Adapters are replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, reduce
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafold.core.anatomy import Anatomy
from lorafold.files.cache import cache_entry, find_cached
from lorafold.models.loading import on_registration, sequential_loading
from lorafold.models.weights import PendingTensor
from lorafold.runtime.memory import RETURN_FREED, malloc_policy
from lorafold.runtime.processes import Processes
from lorafold.training_step.data_parallel import Replicated
from lorafold.training_step.tensor_shards import (
    ByteShard,
    Moments,
    OwnedParameter,
    Shard,
    ShardedReads,
    copy_mapped,
    frozen_shards,
    gather_around,
    gathered_parts,
    large_trained_parameters,
    owners,
    shard_tensor,
    storage_ids,
)


class Sharded(Replicated):
    """Data parallelism with a sharded model, of which one part (a block, the embedding or the head)
    is gathered at a time.
    """

    is_sharded = True

    def __init__(self, processes: Processes) -> None:
        super().__init__(processes)
        self.shards_by_storage: dict[int, Shard] = {}  # by the id of the storage
        self._gathering_mode = ShardedReads(self.shards_by_storage)
        self._parts: list[Sequence[Shard]] = []
        self._current: Sequence[Shard] = ()
        self._backward = False  # whether a backward pass gathered the current part
        self._owned: dict[nn.Parameter, OwnedParameter] = {}
        self._moments = Moments(processes)

    @property
    def _all(self) -> Iterator[Shard]:
        return (shard for part in self._parts for shard in part)

    def sizes(self) -> tuple[int, int, int]:
        """The bytes of all sharded tensors, of this process's shards, and of the largest part."""
        parts = [sum(shard.size for shard in part) for part in self._parts]
        return sum(parts), sum(shard.kept for shard in self._all), max(parts, default=0)

    @contextmanager
    def loading(self, device: torch.device) -> Iterator[None]:
        def keep_part(t: Tensor) -> None:
            if not t.is_meta and getattr(t, "_is_hf_initialized", False):  # its values are loaded
                shard_tensor(t, self.shards_by_storage, self.processes, device)

        with malloc_policy(RETURN_FREED), sequential_loading(), on_registration(keep_part):
            yield

    @contextmanager
    def gathering(self) -> Iterator[None]:
        with self._gathering_mode:
            yield
        self._gathering_mode.empty_filled()

    @contextmanager
    def uncoordinated(self) -> Iterator[None]:
        self._free_current()  # otherwise other processes would keep stale copies
        self._gathering_mode.empty_filled()
        self._gathering_mode.shards = {}
        yield
        self._gathering_mode.shards = self.shards_by_storage

    @contextmanager
    def sharding(self, model: nn.Module) -> Iterator[None]:
        """Context that shards all weights that are still whole, and gathers each part while it
        runs.
        """
        parts, anatomy = self._shard_parts(model), Anatomy.of(model)
        with ExitStack() as stack:
            for path, part in parts.items():
                gather_around(stack, model.get_submodule(path), partial(self.gather, part))
            # the loss reads the head's weight after the decoder has run
            if len(ends := anatomy.vocabulary_ends) > 1:
                decoder = model.get_submodule(anatomy.decoder)
                opens = decoder.register_forward_hook(lambda *_: self.gather(parts[ends[-1]]))
                stack.callback(opens.remove)
            yield

    @torch.no_grad()
    def _shard_parts(self, model: nn.Module) -> dict[str, Sequence[Shard]]:
        params, taken = set[nn.Parameter](), set[int]()
        owner_of, ends = owners(model, self.processes.count), Anatomy.of(model).vocabulary_ends
        parts: dict[str, Sequence[Shard]] = {}
        self._gathering_mode.empty_filled()
        for path in gathered_parts(model):
            part = model.get_submodule(path)
            owned = [self._own(p, owner_of[p]) for p in large_trained_parameters(part, params)]
            shards = [*owned, *frozen_shards(part, self.shards_by_storage, taken, self.processes)]
            tied = next((parts[e] for e in ends if e in parts and not shards), None)
            parts[path] = shards if tied is None else tied
            if tied is None:
                for shard in shards:
                    shard.empty()
                self._parts.append(shards)
        shards_by_storage = {shard.storage._cdata: shard for shard in self._all}
        storages = storage_ids(model)
        for key, shard in self.shards_by_storage.items():
            # tensors outside of parts stay whole; tensors converted after loading are gone
            if key not in shards_by_storage and key in storages and isinstance(shard, ByteShard):
                shard.restore()
        self.shards_by_storage.clear()
        self.shards_by_storage.update(shards_by_storage)
        copy_mapped(model)
        return parts

    def _own(self, p: nn.Parameter, owner: int) -> OwnedParameter:
        before = self.shards_by_storage.pop(p.untyped_storage()._cdata, None)
        parted = before if isinstance(before, ByteShard) else None
        self._owned[p] = shard = OwnedParameter(p, owner, self.processes, parted)
        return shard

    def gather(self, part: Sequence[Shard]) -> None:
        """Gathers a part, and frees the previous one."""
        backward = torch._C._current_graph_task_id() != -1
        # a forward pass after a backward pass of the same part must not keep its gradients
        if part is not self._current or (self._backward and not backward):
            self._free_current()
            self._gathering_mode.empty_filled()
            for shard in part:
                shard.fill()
            self._current = part
        self._backward = backward

    def _free_current(self) -> None:
        for shard in self._current:
            if self._backward:
                shard.reduce_gradient()
            shard.empty()
        self._current, self._backward = (), False

    def owns(self, p: nn.Parameter) -> bool:
        return p not in self._owned or self._owned[p].is_owner

    def updates(self, p: nn.Parameter) -> bool:
        return self.owns(p) and self._moments.is_owner(p)

    def assign_owners(self, parameters: Iterable[nn.Parameter]) -> None:
        """Decides which process updates each of the unsharded parameters."""
        self._moments.assign_owners(p for p in parameters if p not in self._owned)

    def updating(self) -> AbstractContextManager[None]:
        return self._moments.updating()

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self._free_current()
        owned = [*self._owned.values()]
        # gradients that arrived after their block was freed, and parameters without any gradient
        here = [one.p.grad is not None for one in owned]
        late = [has and not one.is_owner for one, has in zip(owned, here, strict=True)]
        had_gradient = [has or one.had_gradient for one, has in zip(owned, here, strict=True)]
        flags = torch.tensor([late, had_gradient], dtype=torch.int32)
        self.processes.add([flags])
        for one, came, had in zip(owned, *flags.tolist(), strict=True):
            if came:
                one.reduce_gradient()
            if not had:
                one.p.grad = None
            one.had_gradient = False
        super().add_gradients([p for p in parameters if p not in self._owned])

    def nonzero_gradients(self, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, bool]:
        here = super().nonzero_gradients(parameters)
        flags = torch.tensor([1 + here[p] if p in here else 0 for p in parameters])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return {p: n == 2 for p, n in zip(parameters, flags.tolist(), strict=True) if n}

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        norms = torch.zeros(len(parameters), device=parameters[0].device)
        for i, p in enumerate(parameters):
            counts = self.processes.first if p not in self._owned else self.owns(p)
            if p.grad is not None and counts:
                norms[i] = torch.linalg.vector_norm(p.grad)
        self.processes.add([norms])
        kinds = {p.grad_dtype or p.dtype for p in parameters}  # the dtype of torch's norm of norms
        return torch.linalg.vector_norm(norms.to(reduce(torch.promote_types, kinds)))

    def pieces(self, state: Mapping[str, Tensor]) -> dict[str, PendingTensor]:
        not_owned = {one.storage._cdata for one in self._owned.values() if not one.is_owner}
        own_shapes = {
            name: (tuple(t.shape), t.dtype)
            for name, t in state.items()
            if t.untyped_storage()._cdata not in not_owned
        }
        pieces = {}
        for index, shapes in enumerate(self.processes.gather(own_shapes)):
            for name, form in shapes.items():
                if name not in pieces:
                    pieces[name] = self._piece(state.get(name), *form, index)
        return dict(sorted(pieces.items()))

    def _piece(
        self, here: Tensor | None, shape: Any, dtype: torch.dtype, index: int
    ) -> PendingTensor:
        def get() -> Tensor:
            if index == self.processes.index and here is not None:
                if index:
                    dist.send(here.detach().cpu().contiguous(), 0)
                return here.detach().clone()  # a byte view makes a storage unresizable
            there = torch.empty(shape if self.processes.first else 0, dtype=dtype)
            if self.processes.first:
                dist.recv(there, index)
            return there

        return PendingTensor(shape, dtype, get)

    def cached(
        self, kind: str, key: str, write: Callable[[Path], None], notice: Callable[[str], None]
    ) -> Path:
        path = find_cached(kind, key)
        if all(self.processes.gather(path is not None)) and path is not None:
            return path
        with TemporaryDirectory() as directory:
            write(Path(directory))  # in all processes, because it runs the model

            def copy(to: Path) -> None:
                copytree(directory, to, dirs_exist_ok=True)

            return cache_entry(kind, key, copy, notice)

    def gather_to_first(self) -> None:
        self._free_current()
        for shard in self._all:
            shard.fill()
            if self.processes.first:
                shard.storage.resize_(shard.size)
            else:
                shard.empty()
