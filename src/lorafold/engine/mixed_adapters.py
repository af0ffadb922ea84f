"""Batches whose rows use different adapters in one forward pass.

    y_b = g (W x_b + up down x_b + bias) + c        with the factors of row b's adapter

The low-rank update is added to the base's matmul before its single rounding. Factors, gains and
offsets of all adapters are in `Stacks`, so a step copies no factors (Chen et al. 2023, Punica,
arXiv 2310.18547; Sheng et al. 2023, S-LoRA, arXiv 2311.03285). Other deltas are computed for their
rows from the base's output. Adapters that can't be mixed run in separate passes with their deltas
attached to the model, so that every method works.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorafold.core.attach import Adapted, attach_delta, detach_delta, selection_of
from lorafold.core.combine import Given
from lorafold.core.delta import Delta, Opaque
from lorafold.core.expert_matrices import module_at
from lorafold.core.layer import Layer, add
from lorafold.engine.adapters import Factors, LoadedAdapter
from lorafold.engine.model_structure import MatrixShapes, Structure
from lorafold.engine.operations import BlockMatmuls, Operations, min_matmul_rows
from lorafold.layers import layer_class
from lorafold.ops.arithmetic import FEW
from lorafold.ops.decoding import Product, SlotFactors, compact_index
from lorafold.ops.host_tensors import send

log = logging.getLogger(__name__)
ENGINE_DELTA = "lorafold-engine"  # adapter name of the engine's deltas
EMPTY_VALUES = {"down": 0.0, "up": 0.0, "gains": 1.0, "offsets": 0.0}  # at unused indices
BASE_PLACE = 0  # the index of rows without an adapter; its factors are zero


class AdapterRows:
    """The adapter of each row of a forward pass (None for the base), and the index of its factors
    in `Stacks`. With `invariant`, rows are computed separately, so that shapes don't depend on
    other rows.
    """

    def __init__(
        self,
        adapters: Sequence[LoadedAdapter | None],
        places: Mapping[LoadedAdapter, int],
        invariant: bool = False,
    ) -> None:
        self.adapters, self.invariant = tuple(adapters), invariant
        present = [adapter for adapter in adapters if adapter is not None]
        self.low_rank = frozenset().union(*(adapter.low_rank for adapter in present))
        self.gains = frozenset().union(*(adapter.gains.keys() for adapter in present))
        self.others = frozenset().union(*(adapter.deltas.keys() for adapter in present))
        self.paths = self.low_rank | self.gains | self.others
        self._by_path: dict[str, list[tuple[Delta, Tensor]]] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self.places = torch.tensor(
            [places.get(a, BASE_PLACE) if a else BASE_PLACE for a in adapters]
        )
        self.matmuls: dict[tuple[str, ...], Product] = {}  # by module paths
        self._place_index: int | slice | Tensor | None = None

    def deltas_at(self, path: str, device: torch.device) -> list[tuple[Delta, Tensor]]:
        """Returns a module's deltas that are not low-rank, each with its rows' indices (n,)."""
        if path not in self._by_path:
            rows: dict[Any, tuple[Delta, list[int]]] = {}
            for b, adapter in enumerate(self.adapters):
                delta = None if adapter is None else adapter.deltas.get(path)
                if delta is not None:
                    rows.setdefault(b if self.invariant else id(delta), (delta, []))[1].append(b)
            self._by_path[path] = [(d, self._sent(tuple(at), device)) for d, at in rows.values()]
        return self._by_path[path]

    def at(self, device: torch.device) -> int | slice | Tensor:
        """Returns the index of the rows' adapters in a tensor (places, ...), as a slice if
        possible.
        """
        if self._place_index is None:
            at = compact_index(self.places)
            self._place_index = send(at, device) if isinstance(at, Tensor) else at
        return self._place_index

    def _sent(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        if rows not in self._rows:
            self._rows[rows] = send(torch.tensor(rows), device)
        return self._rows[rows]


class EngineDelta(Opaque):
    def __init__(self, slot_adapters: SlotAdapters, path: str) -> None:
        super().__init__()
        # a tuple, because nn.Module would register it as a submodule
        self._slot_adapters, self.path = (slot_adapters,), path

    def forward(self, layer: Layer, x: Tensor, *args: Any, onto: Tensor | None = None) -> Tensor:
        slot_adapters = self._slot_adapters[0]
        plan = slot_adapters.plan
        d = slot_adapters.product((self.path,), x, [layer]) if self.path in plan.low_rank else None
        y = layer(x, *args, onto=add(d, onto) if d is not None else onto)
        return slot_adapters.apply_deltas(self.path, layer, x, y)


class SlotAdapters:
    def __init__(self, structure: Structure, slots: int, operations: Operations) -> None:
        self.structure, self.index_of, self.operations = structure, structure.index_of, operations
        self.stacks = [Stacks(shape, operations) for shape in structure.shapes]
        self.plan, self._slots, self._num_places = AdapterRows([], {}), slots, BASE_PLACE + 1
        self.placed: dict[int, LoadedAdapter] = {}  # by slot
        self.places: dict[LoadedAdapter, int] = {}
        self._min_rows: dict[torch.dtype, int] = {}
        self.in_blocks = False  # PyTorch's matmuls need `BlockMatmuls` to be batch invariant

    def place(self, slot: int, adapter: LoadedAdapter) -> None:
        assert slot not in self.placed
        self.placed[slot] = adapter
        if adapter in self.places:
            return
        taken = {BASE_PLACE, *self.places.values()}
        place = next(n for n in count() if n not in taken)
        if place >= self._num_places:
            self._num_places = min(self._slots + 1, 2 * self._num_places)
            for stacks in self.stacks:
                stacks.widen(self._num_places)
        self.places[adapter] = place
        for i, factors in adapter.factors.items():
            self.stacks[i].place(place, factors)
        for path, (g, c) in adapter.gains.items():
            shape, index = self.index_of[path]
            self.stacks[shape].set_gain(place, index, g, c)

    def clear(self, slot: int) -> None:
        adapter = self.placed.pop(slot, None)
        if adapter is None or adapter in self.placed.values():
            return
        place = self.places.pop(adapter)
        for i in {*adapter.factors, *(self.index_of[path][0] for path in adapter.gains)}:
            self.stacks[i].clear(place)

    def product(self, paths: tuple[str, ...], x: Tensor, layers: Sequence[Layer]) -> Tensor:
        """Returns the low-rank updates (B, T, out + ...) of matrices with the same input x (B, T,
        in).
        """
        plan = self.plan
        if plan.invariant:
            updates = [self._product_by_row(*at, x) for at in zip(paths, layers, strict=True)]
            return torch.cat(updates, -1) if len(updates) > 1 else updates[0]
        if paths not in plan.matmuls:
            factors = [self._factors(path) for path in paths]
            plan.matmuls[paths] = self.operations.low_rank(factors, plan.places)
        return plan.matmuls[paths](x.reshape(len(x), -1, x.shape[-1])).view(*x.shape[:-1], -1)

    def apply_deltas(self, path: str, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        """Applies gains, and deltas that are not low-rank, to a module's output y (B, T, out) for
        its input x (B, T, in).
        """
        if path in self.plan.gains:
            shape, index = self.index_of[path]
            tensors, at = self.stacks[shape].tensors, self.plan.at(y.device)
            c = tensors["offsets"][index][at] if "offsets" in tensors else None
            y = self.operations.scale(y, tensors["gains"][index][at], c)
        deltas = self.plan.deltas_at(path, y.device) if path in self.plan.others else ()
        for delta, rows in deltas:
            x_n, y_n = x[rows], y[rows]
            # repeated, because kernels sum in another order for few tokens; FEW, because a delta's
            # matrices have other shapes than those that `min_rows` measures
            least = max(self.min_rows(x.dtype, x.device), FEW if x.is_cpu else 1)
            repeats = -(-least * x_n.shape[-1] // x_n.numel())
            if repeats > 1:
                x_n, y_n = (torch.cat([t] * repeats) for t in (x_n, y_n))
            with BlockMatmuls(FEW) if self.in_blocks else nullcontext():
                part = delta(Given(layer, y_n, x_n), x_n)[: len(rows)]
            y = y.index_copy(0, rows, part.to(y.dtype))
        return y

    def min_rows(self, dtype: torch.dtype, device: torch.device) -> int:
        """Returns the number of tokens from which PyTorch's matmuls with the model's matrices are
        batch invariant. Returns 2 if it is unknown, or if none is small enough and matmuls run in
        blocks.
        """
        if device.type != "cpu":
            return 2
        if dtype not in self._min_rows:
            shapes = {(shape.out, shape.in_features) for shape in self.structure.shapes}
            min_rows = max(2, min_matmul_rows(shapes, dtype))
            if min_rows > FEW and self._slots > 1:
                log.debug(
                    "on this CPU, torch's matmuls in %s depend on the number of rows, so for"
                    " quantized weights and for adapters that are not low-rank, the engine computes"
                    " them %d rows at a time", dtype, FEW,
                )  # fmt: skip
                self.in_blocks = True
            self._min_rows[dtype] = min_rows if min_rows <= FEW else 2
        return self._min_rows[dtype]

    def _factors(self, path: str) -> SlotFactors:
        shape, index = self.index_of[path]
        stacks = self.stacks[shape]
        if path not in self.plan.low_rank:
            return SlotFactors(None, None, torch.zeros_like(stacks.ranks), stacks.shape.out)
        down, up = stacks.tensors["down"][index], stacks.tensors["up"][index]
        return SlotFactors(down, up, stacks.ranks, stacks.shape.out)

    def _product_by_row(self, path: str, layer: Layer, x: Tensor) -> Tensor:
        shape, index = self.index_of[path]
        out = x.new_zeros(*x.shape[:-1], layer.shape[0])
        for b, adapter in enumerate(self.plan.adapters):
            if adapter is not None and path in adapter.low_rank:
                factors = adapter.factors[shape]
                k = factors.index[index]
                u = layer.op(x[b : b + 1], factors.down[k].t())
                out[b] = torch.matmul(u.to(factors.up.dtype), factors.up[k])[0]
        return out


class Stacks:
    """Factors, gains and offsets of all adapters for the n matrices of one shape. An adapter's
    factors are copied here when its first request gets a slot.
    """

    def __init__(self, shape: MatrixShapes, operations: Operations) -> None:
        self.shape, self.operations = shape, operations
        self.ranks = torch.zeros(BASE_PLACE + 1, dtype=torch.long)
        # down (n, places, r, in), up (n, places, r, out), gains and offsets (n, places, out)
        self.tensors: dict[str, Tensor] = {}

    def place(self, place: int, factors: Factors) -> None:
        """Copies an adapter's factors to index `place`, which must be cleared."""
        rank, tensors = factors.down.shape[2], self.tensors
        if "down" not in tensors or tensors["down"].shape[2] < rank:
            self._grow(rank, factors.down)
        tensors["down"][factors.at, place, :rank] = factors.down.mT.to(tensors["down"].dtype)
        tensors["up"][factors.at, place, :rank] = factors.up.to(tensors["up"].dtype)
        self.ranks[place] = rank

    def set_gain(self, place: int, index: int, g: Tensor, c: Tensor | None) -> None:
        """Copies one matrix's gain and offset (out,) to index `place`."""
        shape = len(self.shape.paths), len(self.ranks), self.shape.out
        for name, value in (("gains", g), ("offsets", c)):
            if value is not None:
                if name not in self.tensors:
                    with torch.inference_mode(False):
                        stack = value.new_full(shape, EMPTY_VALUES[name], dtype=torch.float32)
                    self.tensors[name] = stack
                self.tensors[name][index, place] = value

    def clear(self, place: int) -> None:
        for name, stack in self.tensors.items():
            stack[:, place] = EMPTY_VALUES[name]
        self.ranks[place] = 0

    def widen(self, places: int) -> None:
        more = places - len(self.ranks)
        self.ranks = pad(self.ranks, (0, more))
        with torch.inference_mode(False):
            for name, stack in self.tensors.items():
                wider = (*[0] * (2 * stack.dim() - 4), 0, more)
                self.tensors[name] = pad(stack, wider, value=EMPTY_VALUES[name])

    def _grow(self, rank: int, like: Tensor) -> None:
        n, places, dtype = len(self.shape.paths), len(self.ranks), self.operations.stored(like)
        with torch.inference_mode(False):
            for name, width in (("down", self.shape.in_features), ("up", self.shape.out)):
                stack, old = like.new_zeros(n, places, rank, width, dtype=dtype), self.tensors
                if name in old:
                    stack[:, :, : old[name].shape[2]] = old[name]
                self.tensors[name] = stack


class ActiveDeltas:
    def __init__(self, model: nn.Module, slot_adapters: SlotAdapters) -> None:
        self.model, self.slot_adapters = model, slot_adapters
        self.selection = selection_of(model)
        self.base = self.selection.names
        self.mixing = False  # a pass with `slot_adapters.plan` is running
        self._targets: set[str] = set()  # modules with an `EngineDelta`
        self._fused: dict[str, Any] = {}  # modules whose fast forward ignores deltas
        self._num_attached: Counter[LoadedAdapter] = Counter()

    def attach(self, adapter: LoadedAdapter) -> None:
        """Attaches the deltas that forward passes with this adapter need."""
        if adapter.separate:
            self._num_attached[adapter] += 1
            if self._num_attached[adapter] == 1:
                for path, delta in adapter.deltas.items():
                    self._attach(path, adapter.key, delta)
            return
        for path in sorted(adapter.paths - self._targets):
            self._attach(path, ENGINE_DELTA, EngineDelta(self.slot_adapters, path))
            self._targets.add(path)

    def detach(self, adapter: LoadedAdapter) -> None:
        if adapter.separate:
            self._num_attached[adapter] -= 1
            if not self._num_attached[adapter]:
                del self._num_attached[adapter]
                for path in adapter.deltas:
                    self._detach(path, adapter.key)

    @contextmanager
    def mixed(self, plan: AdapterRows) -> Iterator[None]:
        self.slot_adapters.plan, self.mixing = plan, True
        try:
            with self._active(plan.paths, *((ENGINE_DELTA,) if plan.paths else ())):
                yield
        finally:
            self.mixing = False

    def separate(self, adapter: LoadedAdapter) -> AbstractContextManager[None]:
        return self._active(adapter.paths, adapter.key)

    def close(self) -> None:
        for adapter in list(self._num_attached):
            self._num_attached[adapter] = 1
            self.detach(adapter)
        for path in self._targets:
            self._detach(path, ENGINE_DELTA)
        self._targets.clear()

    @contextmanager
    def _active(self, paths: frozenset[str], *names: str) -> Iterator[None]:
        before = self.selection.names
        hidden = {
            path: vars(module).pop("forward")
            for path, module in self._fused.items()
            if path in paths
        }
        self.selection.names = (*self.base, *names)
        try:
            yield
        finally:
            self.selection.names = before
            for path, forward in hidden.items():
                self._fused[path].forward = forward

    def _attach(self, path: str, name: str, delta: Delta) -> None:
        module = module_at(self.model, path)
        if "forward" in vars(module):
            self._fused[path] = module
        attach_delta(module, layer_class(module), name, delta.eval(), self.selection, path)

    def _detach(self, path: str, name: str) -> None:
        module = module_at(self.model, path)
        if isinstance(module, Adapted) and name in module.deltas:
            detach_delta(module, name)
        if not isinstance(module, Adapted):
            self._fused.pop(path, None)
