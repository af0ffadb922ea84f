"""Any mixture of adapters in one pass: each row of a batch under its own.

    y_b = g (W x_b + up down x_b + bias) + c        of the place p(b) of row b's adapter

What low-rank adapters add is accumulated by the base's own product before the one rounding. Their
factors are in `Stacks`, and so are gains and offsets, if an adapter has any, so that a step gathers
nothing (Chen et al. 2023, Punica, arXiv 2310.18547; Sheng et al. 2023, S-LoRA, arXiv 2311.03285).
Requests of one adapter share its place. Adapters of other kinds compute their rows over the same
output. Rows of the base are computed by nothing.

A pass of rows of one adapter that can't be mixed runs under that adapter's deltas themselves, which
are on the model while one of its requests runs; so any method works there, also where a model reads
folded weights. `ActiveDeltas` lays both on the model's modules, the engine's own deltas when the
first adapter comes that changes a module.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorafold.core.attach import Adapted, lay, lift, selection_of
from lorafold.core.combine import Given
from lorafold.core.delta import Delta, Opaque
from lorafold.core.layer import Layer, add
from lorafold.core.matrices import module_at
from lorafold.engine.adapters import Factors, LoadedAdapter
from lorafold.engine.model_structure import MatrixShapes, Structure
from lorafold.engine.operations import InBlocks, Operations, plain_products
from lorafold.layers import layer_class
from lorafold.ops.arithmetic import FEW
from lorafold.ops.decoding import Product, SlotFactors
from lorafold.ops.host_tensors import sent

log = logging.getLogger(__name__)
OWN = "lorafold-engine"
FILLS = {"down": 0.0, "up": 0.0, "gains": 1.0, "offsets": 0.0}  # stacks, and what is in no place
NOBODY = 0  # the place of rows of the base, which stays zero


class AdapterRows:
    """Which adapter each row of a pass has."""

    def __init__(
        self,
        held: Sequence[LoadedAdapter | None],
        places: Mapping[LoadedAdapter, int],
        each: bool = False,
    ) -> None:
        self.held = tuple(held)
        found = [h for h in held if h is not None]
        self.products = frozenset().union(*(h.products for h in found))
        self.gains = frozenset().union(*(h.gains.keys() for h in found))
        self.others = frozenset().union(*(h.deltas.keys() for h in found))
        self.paths = self.products | self.gains | self.others  # all that an adapter changes
        self.each = each
        self._with_others = [b for b in range(len(held)) if (h := held[b]) is not None and h.deltas]
        self._by_path: dict[str, list[tuple[Delta, Tensor]]] = {}
        self._rows: dict[tuple[int, ...], Tensor] = {}
        self.places = torch.tensor([NOBODY if h is None else places.get(h, NOBODY) for h in held])
        self.one: dict[tuple[str, ...], Product] = {}  # by paths
        self._at: int | slice | Tensor | None = None

    def deltas_at(self, path: str, device: torch.device) -> list[tuple[Delta, Tensor]]:
        """The deltas at a module that are no products, each with its rows (n,), on the device."""
        if path not in self._by_path:
            rows: dict[Any, tuple[Delta, list[int]]] = {}
            for b in self._with_others:
                delta = self.held[b].deltas.get(path)  # type: ignore[union-attr]
                if delta is not None:
                    rows.setdefault(b if self.each else id(delta), (delta, []))[1].append(b)
            self._by_path[path] = [(d, self._sent(tuple(at), device)) for d, at in rows.values()]
        return self._by_path[path]

    def at(self, device: torch.device) -> int | slice | Tensor:
        """What picks the places of the rows from a stack (places, ...): of one place one of them,
        of neighbours a part without a copy.
        """
        if self._at is None:
            first, n = int(self.places[0]), len(self.places)
            if torch.equal(self.places, torch.full_like(self.places, first)):
                self._at = first
            elif torch.equal(self.places, torch.arange(first, first + n)):
                self._at = slice(first, first + n)
            else:
                self._at = sent(self.places, device)
        return self._at

    def _sent(self, rows: tuple[int, ...], device: torch.device) -> Tensor:
        if rows not in self._rows:  # for all modules
            self._rows[rows] = sent(torch.tensor(rows), device)
        return self._rows[rows]


class EngineDelta(Opaque):
    """The delta that the engine lays on a module: for each row of the pass, that of its adapter."""

    def __init__(self, products: Products, path: str) -> None:
        super().__init__()
        self._products, self.path = (products,), path  # in a tuple: it is no part of this module

    def forward(self, layer: Layer, x: Tensor, *args: Any, onto: Tensor | None = None) -> Tensor:
        products = self._products[0]
        plan = products.plan
        d = products.product((self.path,), x, [layer]) if self.path in plan.products else None
        y: Tensor = layer(x, *args, onto=add(d, onto) if d is not None else onto)
        return products.changed(self.path, layer, x, y)


class Products:
    """The stacks of all shapes, and the plan of the pass that runs."""

    def __init__(self, structure: Structure, slots: int, operations: Operations) -> None:
        self.structure, self.where, self.operations = structure, structure.where, operations
        self.stacks = [Stacks(shape, operations) for shape in structure.shapes]
        self.plan, self._slots, self._room = AdapterRows([], {}), slots, NOBODY + 1
        self.placed: dict[int, LoadedAdapter] = {}  # by slot
        self.places: dict[LoadedAdapter, int] = {}  # of those
        self._least: dict[torch.dtype, int] = {}
        self.in_blocks = False  # whether no number of rows is steady in torch's own products

    def place(self, slot: int, held: LoadedAdapter) -> None:
        """Give a slot an adapter."""
        assert slot not in self.placed
        self.placed[slot] = held
        if held in self.places:
            return
        taken = {NOBODY, *self.places.values()}
        place = next(n for n in count() if n not in taken)
        if place >= self._room:
            self._room = min(self._slots + 1, 2 * self._room)
            for stacks in self.stacks:
                stacks.widen(self._room)
        self.places[held] = place
        for i, factors in held.factors.items():
            self.stacks[i].place(place, factors)
        for path, (g, c) in held.gains.items():
            shape, index = self.where[path]
            self.stacks[shape].gain(place, index, g, c)

    def clear(self, slot: int) -> None:
        """Take a slot's adapter away, if it has one."""
        held = self.placed.pop(slot, None)
        if held is None or held in self.placed.values():
            return
        place = self.places.pop(held)
        for i in {*held.factors, *(self.where[path][0] for path in held.gains)}:
            self.stacks[i].clear(place)

    def product(self, paths: tuple[str, ...], x: Tensor, layers: Sequence[Layer]) -> Tensor:
        """What the low-rank adapters of the plan add at matrices that read the same tensor, side by
        side: (B, T, out + ...).
        """
        plan = self.plan
        if plan.each:
            found = [self._by_row(*at, x) for at in zip(paths, layers, strict=True)]
            return torch.cat(found, -1) if len(found) > 1 else found[0]
        if paths not in plan.one:
            parts = [self._part(path) for path in paths]
            plan.one[paths] = self.operations.low_rank(parts, plan.places)
        flat = x.reshape(len(x), -1, x.shape[-1])
        return plan.one[paths](flat).view(*x.shape[:-1], -1)

    def changed(self, path: str, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        """The output (B, T, out) of a module after the plan's gains, and after those of its deltas
        that are of no form.
        """
        if path in self.plan.gains:
            y = self._gained(path, y)
        deltas = self.plan.deltas_at(path, y.device) if path in self.plan.others else ()
        for delta, rows in deltas:
            own, its = x[rows], y[rows]
            # kernels sum few tokens in an order of their own
            many = -(-self.least(x.dtype, x.device) * own.shape[-1] // own.numel())
            if many > 1:
                own, its = (torch.cat([t] * many) for t in (own, its))
            with InBlocks(FEW) if self.in_blocks else nullcontext():
                part = delta(Given(layer, its, own), own)[: len(rows)]
            y = y.index_copy(0, rows, part.to(y.dtype))
        return y

    def least(self, dtype: torch.dtype, device: torch.device) -> int:
        """From how many tokens on torch's own products with the model's matrices have the same bits
        whatever the number of tokens; 2 where that is not known, and where they are computed in
        blocks, as no number is steady.
        """
        if device.type != "cpu":
            return 2
        if dtype not in self._least:
            shapes = {(shape.out, shape.inn) for shape in self.structure.shapes}
            found = max(2, plain_products(shapes, dtype))
            if found > FEW and self._slots > 1:
                log.warning(
                    "torch's products in %s depend on the number of rows here, so where the"
                    " engine computes with them (quantized weights, adapters that are no low-rank"
                    " products) they are computed %d rows at a time", dtype, FEW,
                )  # fmt: skip
                self.in_blocks = True
            self._least[dtype] = found if found <= FEW else 2
        return self._least[dtype]

    def _gained(self, path: str, y: Tensor) -> Tensor:
        shape, index = self.where[path]
        stacks, at = self.stacks[shape], self.plan.at(y.device)
        assert stacks.gains is not None
        c = None if stacks.offsets is None else stacks.offsets[index][at]
        return self.operations.scale(y, stacks.gains[index][at], c)

    def _part(self, path: str) -> SlotFactors:
        shape, index = self.where[path]
        stacks = self.stacks[shape]
        if path not in self.plan.products or stacks.down is None or stacks.up is None:
            return SlotFactors(None, None, torch.zeros_like(stacks.ranks), stacks.shape.out)
        return SlotFactors(stacks.down[index], stacks.up[index], stacks.ranks, stacks.shape.out)

    def _by_row(self, path: str, layer: Layer, x: Tensor) -> Tensor:
        shape, index = self.where[path]
        out = x.new_zeros(*x.shape[:-1], layer.shape[0])
        for b, held in enumerate(self.plan.held):
            if held is not None and path in held.products:
                factors = held.factors[shape]
                k = factors.index[index]
                u = layer.op(x[b : b + 1], factors.down[k].t())
                out[b] = torch.matmul(u.to(factors.up.dtype), factors.up[k])[0]
        return out


class Stacks:
    """What the adapter in each place has for the n matrices of one shape, side by side. It is
    copied there when an adapter's first request gets its slot.
    """

    def __init__(self, shape: MatrixShapes, operations: Operations) -> None:
        self.shape, self.operations = shape, operations
        self.ranks = torch.zeros(NOBODY + 1, dtype=torch.long)
        self.down: Tensor | None = None  # (n, places, r, in)
        self.up: Tensor | None = None  # (n, places, r, out)
        self.gains: Tensor | None = None  # (n, places, out), 1 where there is none
        self.offsets: Tensor | None = None  # (n, places, out)

    def place(self, place: int, factors: Factors) -> None:
        """Copy an adapter's factors to a place, which is zero."""
        rank = factors.down.shape[2]
        if self.down is None or self.down.shape[2] < rank:
            self._grow(rank, factors.down)
        assert self.down is not None
        assert self.up is not None
        self.down[factors.at, place, :rank] = factors.down.mT.to(self.down.dtype)
        self.up[factors.at, place, :rank] = factors.up.to(self.up.dtype)
        self.ranks[place] = rank

    def gain(self, place: int, index: int, g: Tensor, c: Tensor | None) -> None:
        """Copy a gain and an offset (out,) to a place, for the matrix with that index."""
        with torch.inference_mode(False):
            shape = len(self.shape.paths), len(self.ranks), self.shape.out
            if self.gains is None:
                self.gains = g.new_ones(shape, dtype=torch.float32)
            if self.offsets is None and c is not None:
                self.offsets = g.new_zeros(shape, dtype=torch.float32)
        self.gains[index, place] = g
        if c is not None and self.offsets is not None:
            self.offsets[index, place] = c

    def clear(self, place: int) -> None:
        """Have nothing in a place."""
        for name, fill in FILLS.items():
            if (stack := getattr(self, name)) is not None:
                stack[:, place] = fill
        self.ranks[place] = 0

    def widen(self, places: int) -> None:
        """Have so many places, which are more than there are."""
        more = places - len(self.ranks)
        self.ranks = pad(self.ranks, (0, more))
        with torch.inference_mode(False):
            for name, fill in FILLS.items():
                if (stack := getattr(self, name)) is not None:
                    wider = (*[0] * (2 * stack.dim() - 4), 0, more)
                    setattr(self, name, pad(stack, wider, value=fill))

    def _grow(self, rank: int, like: Tensor) -> None:
        n, places, old = len(self.shape.paths), len(self.ranks), (self.down, self.up)
        with torch.inference_mode(False):
            dtype = self.operations.stored(like)
            self.down = like.new_zeros(n, places, rank, self.shape.inn, dtype=dtype)
            self.up = like.new_zeros(n, places, rank, self.shape.out, dtype=dtype)
        for new, t in zip((self.down, self.up), old, strict=True):
            if t is not None:
                new[:, : t.shape[1], : t.shape[2]] = t


class ActiveDeltas:
    """The engine's deltas on one model."""

    def __init__(self, model: nn.Module, products: Products) -> None:
        self.model, self.products = model, products
        self.selection = selection_of(model)
        self.base = self.selection.names
        self.mixing = False  # whether a pass under the plan runs
        self.aware: set[str] = set()  # modules whose own fast forward looks at the plan
        self._sites: set[str] = set()
        self._fused: dict[str, Any] = {}  # modules with deltas whose fast forward knows of none
        self._apart: Counter[LoadedAdapter] = Counter()

    def hold(self, held: LoadedAdapter) -> None:
        """Make ready for passes with this adapter, until `drop`."""
        if held.apart:
            self._apart[held] += 1
            if self._apart[held] == 1:
                for path, delta in held.deltas.items():
                    self._lay(path, held.entry.key, delta)
            return
        for path in sorted(held.paths - self._sites):
            self._lay(path, OWN, EngineDelta(self.products, path))
            self._sites.add(path)

    def drop(self, held: LoadedAdapter) -> None:
        """Undo one `hold`."""
        if held.apart:
            self._apart[held] -= 1
            if not self._apart[held]:
                del self._apart[held]
                for path in held.deltas:
                    self._lift(path, held.entry.key)

    @contextmanager
    def mixed(self, plan: AdapterRows) -> Iterator[None]:
        """A pass whose rows have the adapters of the plan."""
        self.products.plan, self.mixing = plan, True
        try:
            with self._active(plan.paths, *((OWN,) if plan.paths else ())):
                yield
        finally:
            self.mixing = False

    @contextmanager
    def alone(self, held: LoadedAdapter) -> Iterator[None]:
        """A pass whose rows all have this adapter, which can't be mixed."""
        with self._active(held.paths, held.entry.key):
            yield

    def close(self) -> None:
        """Take everything off the model."""
        for held in list(self._apart):
            self._apart[held] = 1
            self.drop(held)
        for path in self._sites:
            self._lift(path, OWN)
        self._sites.clear()

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

    def _lay(self, path: str, name: str, delta: Delta) -> None:
        module = module_at(self.model, path)
        if path not in self.aware and "forward" in vars(module):
            self._fused[path] = module
        lay(module, layer_class(module), name, delta.eval(), self.selection, path)

    def _lift(self, path: str, name: str) -> None:
        module = module_at(self.model, path)
        if isinstance(module, Adapted) and name in module.deltas:
            lift(module, name)
        if not isinstance(module, Adapted):
            self._fused.pop(path, None)
