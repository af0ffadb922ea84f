"""Any mixture of adapters in one pass: each row of a batch under its own.

    y_b = W x_b + up_s(b) down_s(b) x_b         s(b) the slot of row b

Low-rank adapters are two batched products a matrix, accumulated by the base's own product before
the one rounding. Their factors are copied to stacks, down (n, slots, in, r) and up (n, slots, r,
out) for the n matrices of one shape, when a request gets its slot, so that a step gathers nothing.
Where all rows have one adapter, they are one product instead (Chen et al. 2023, Punica, arXiv
2310.18547; Sheng et al. 2023, S-LoRA, arXiv 2311.03285). Adapters of other kinds run
through `PerExample` over the same output. Rows of the base are computed by nothing.

The stacks are fp32 on a CPU, whose batched product with one row takes 11 us for 16 x (576, 16) in
fp32, and 34 us in bf16; with 64 rows each, 8 x (576, 16) and its up factor of 1536 take 103 us in
bf16, and 542 us one adapter after the other (two cores of an AMD EPYC).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafold.core.combine import PerExample, Slots
from lorafold.core.delta import Delta, Opaque
from lorafold.core.layer import Given, Layer, add
from lorafold.engine.adapters import Factors, Held
from lorafold.engine.structure import Shape, Structure

ROWS = 4  # more input vectors than this with one adapter are one product


class Stacks:
    """The factors of the adapter in each slot, for the matrices of one shape."""

    def __init__(self, shape: Shape, slots: int) -> None:
        self.shape, self.slots = shape, slots
        self.down: Tensor | None = None  # (n, slots, in, r)
        self.up: Tensor | None = None  # (n, slots, r, out)

    def place(self, slot: int, factors: Factors) -> None:
        """Copy an adapter's factors to a slot, which is zero."""
        rank = factors.down.shape[2]
        if self.down is None or self.down.shape[3] < rank:
            self._grow(rank, factors.down)
        assert self.down is not None
        assert self.up is not None
        self.down[factors.at, slot, :, :rank] = factors.down.to(self.down.dtype)
        self.up[factors.at, slot, :rank] = factors.up.to(self.up.dtype)

    def clear(self, slot: int) -> None:
        """Set a slot to zero."""
        if self.down is not None and self.up is not None:
            self.down[:, slot].zero_()
            self.up[:, slot].zero_()

    def _grow(self, rank: int, like: Tensor) -> None:
        n, old = len(self.shape.paths), (self.down, self.up)
        with torch.inference_mode(False):
            dtype = torch.float32 if like.device.type == "cpu" else like.dtype
            self.down = like.new_zeros(n, self.slots, self.shape.inn, rank, dtype=dtype)
            self.up = like.new_zeros(n, self.slots, rank, self.shape.out, dtype=dtype)
        if old[0] is not None and old[1] is not None:
            self.down[..., : old[0].shape[3]] = old[0]
            self.up[:, :, : old[1].shape[2]] = old[1]


class Plan:
    """Which adapter each row of a pass has.

    Args:
        held: the adapter of each of the B rows, or None.
        slots: the slots of the rows.
        each: compute each row on its own, so that shapes never depend on the others.
    """

    def __init__(
        self, held: Sequence[Held | None], slots: slice | Sequence[int], each: bool = False
    ) -> None:
        self.held = tuple(held)
        self.slots = slots if isinstance(slots, slice) else torch.tensor(slots)
        found = [h for h in held if h is not None]
        distinct = [*dict.fromkeys(found)] if not each else found
        self.products = frozenset().union(*(h.products for h in found))
        self.others = frozenset().union(*(h.deltas.keys() for h in found))
        rows = range(len(held))
        self.segments: list[tuple[Held, Tensor | None]] = []
        for one in distinct if not each else ():
            at = [b for b in rows if held[b] is one]
            if one.products:
                self.segments.append((one, None if len(at) == len(held) else torch.tensor(at)))
        self.each = each
        self._with_others = [b for b in rows if (h := held[b]) is not None and h.deltas]
        self._by_path: dict[str, Delta | None] = {}
        self.stacks: dict[str, tuple[Tensor, Tensor]] = {}  # down (B, in, r), up (B, r, out)

    @property
    def empty(self) -> bool:
        """Whether every row is the base's."""
        return not (self.products or self.others)

    def stacked(self, tokens: int) -> bool:
        """Whether rows of that many tokens each are multiplied with the stacks."""
        alone = len(self.segments) == 1 and len(self.held) * tokens > ROWS
        return bool(self.segments) and not alone

    def rows_at(self, path: str, device: torch.device) -> Delta | None:
        """The deltas at a module that are no products, each for its rows, or the one that all rows
        have; None if there is none.
        """
        if path not in self._by_path:
            at, deltas, numbers = [0] * len(self.held), [], {}
            for b in self._with_others:
                delta = self.held[b].deltas.get(path)  # type: ignore[union-attr]
                if delta is None:
                    continue
                if self.each or id(delta) not in numbers:
                    deltas.append(delta)
                    numbers[id(delta)] = len(deltas)
                at[b] = numbers[id(delta)]
            made: Delta | None = PerExample(deltas, Slots(torch.tensor(at, device=device)))
            if len(deltas) < 2 and (not deltas or all(at)):
                made = next(iter(deltas), None)
            self._by_path[path] = made
        return self._by_path[path]


class Site(Opaque):
    """The delta that the engine lays on a module: for each row of the pass, that of its adapter."""

    def __init__(self, products: Products, path: str) -> None:
        super().__init__()
        self._products, self.path = (products,), path  # in a tuple: it is no part of this module

    def forward(self, layer: Layer, x: Tensor, *args: Any, onto: Tensor | None = None) -> Tensor:
        products = self._products[0]
        plan = products.plan
        d = products.product(self.path, x, layer) if self.path in plan.products else None
        y: Tensor = layer(x, *args, onto=add(d, onto) if d is not None else onto)
        rows = plan.rows_at(self.path, y.device) if self.path in plan.others else None
        return y if rows is None else rows(Given(layer, y, x), x)


class Products:
    """The stacks of all shapes, and the plan of the pass that runs.

    Args:
        structure: what is known of the model.
        slots: how many requests run at a time.
    """

    def __init__(self, structure: Structure, slots: int) -> None:
        self.where = structure.where
        self.stacks = [Stacks(shape, slots) for shape in structure.shapes]
        self.plan = Plan([], ())
        self.placed: dict[int, Held] = {}

    def place(self, slot: int, held: Held) -> None:
        """Give a slot an adapter."""
        assert slot not in self.placed
        self.placed[slot] = held
        for i, factors in held.factors.items():
            self.stacks[i].place(slot, factors)

    def clear(self, slot: int) -> None:
        """Take a slot's adapter away, if it has one."""
        held = self.placed.pop(slot, None)
        for i in () if held is None else held.factors:
            self.stacks[i].clear(slot)

    def product(self, path: str, x: Tensor, layer: Layer) -> Tensor:
        """What the low-rank adapters of the plan add at a module, (B, T, out).

        Args:
            path: the module's path, one of the plan's products.
            x: its input (B, T, in).
            layer: the module as a layer.
        """
        plan, (shape, index) = self.plan, self.where[path]
        tokens = x[0].numel() // x.shape[-1]
        if plan.stacked(tokens):
            if path not in plan.stacks:
                stacks = self.stacks[shape]
                assert stacks.down is not None
                assert stacks.up is not None
                plan.stacks[path] = stacks.down[index][plan.slots], stacks.up[index][plan.slots]
            down, up = plan.stacks[path]
            if tokens > 1:  # the factors' values are those of this dtype
                down, up = down.to(x.dtype), up.to(x.dtype)
            flat = x.reshape(len(x), -1, x.shape[-1]).to(down.dtype)
            return torch.bmm(torch.bmm(flat, down), up).view(*x.shape[:-1], -1).to(x.dtype)
        out: Tensor | None = None
        for held, rows in self._segments(path):
            factors = held.factors[shape]
            k = factors.index[index]
            taken = x if rows is None else x[rows]
            u = layer.op(taken, factors.down[k].t())
            part = torch.matmul(u.to(factors.up.dtype), factors.up[k])
            if rows is None:
                return part
            if out is None:
                out = part.new_zeros(len(x), *part.shape[1:])
            out.index_copy_(0, rows, part)
        assert out is not None
        return out

    def _segments(self, path: str) -> list[tuple[Held, Tensor | None]]:
        plan = self.plan
        if plan.each:
            rows = enumerate(plan.held)
            found = [(h, torch.tensor([b])) for b, h in rows if h and path in h.products]
            return found  # type: ignore[return-value]
        return [(h, rows) for h, rows in plan.segments if path in h.products]
