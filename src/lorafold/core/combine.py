"""Combinators: deltas that consist of other deltas, of any method and on any quantization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafold.core.delta import Delta, Factors, LowRank, Opaque, Over, Upon, of_under
from lorafold.core.layer import Layer, WeightAndBias, add


class Stack(Delta):
    """Several deltas of one adapter at one layer, such as LoRA and a trained bias, applied in
    order: W -> fold2(fold1(W)).
    """

    def __init__(self, deltas: Iterable[Delta]) -> None:
        super().__init__()
        self.deltas = nn.ModuleList(deltas)

    def parts(self) -> Iterable[Delta]:
        return (part for delta in self.deltas for part in delta.parts())  # type: ignore[operator]

    def factors(self) -> Factors | None:
        pairs = [delta.factors() for delta in self.deltas]  # type: ignore[operator]
        if any(pair is None for pair in pairs):
            return None
        ups, downs = zip(*pairs, strict=True)
        return torch.cat(ups, -1), torch.cat(downs, -2)

    def forward(self, layer: Layer, *args: Any, **kwargs: Any) -> Any:
        for delta in self.deltas:
            layer = Over(delta, layer)  # type: ignore[arg-type]
        return layer(*args, **kwargs)

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        for delta in self.deltas:
            w, b = delta.fold(w, b)  # type: ignore[operator]
        return w, b


@dataclass(eq=False)
class Slots:
    """Assigns a delta to each element of the next batch: `at` (batch,) holds 0 for none, i for the
    i-th.
    """

    at: Tensor


def up_names_in(combinator: nn.Module) -> tuple[str, ...]:
    """Returns the names, relative to the combinator, of the up factors of all deltas inside it."""
    inside = [(path, m) for path, m in combinator.named_modules() if path and isinstance(m, Delta)]
    return tuple(f"{path}.{name}" for path, m in inside for name in type(m).up_names)


class Mix(Delta):
    """Adds the changes of several deltas d_i, weighted by learned gates g (n,) in fp32.

    The output is y + sum_i g_i (d_i(x) - y), with the output y of the layer below. A Parameter that
    is passed as `gates` is not copied, so layers can share it. Folding gives W + sum_i g_i
    (fold_i(W) - W), and raises NotMergeable if folding one of the deltas does.
    """

    def __init__(self, deltas: Sequence[Delta], gates: Tensor) -> None:
        super().__init__()
        self.deltas = nn.ModuleList(deltas)
        self.gates = gates if isinstance(gates, nn.Parameter) else nn.Parameter(gates.float())
        self.up_names = up_names_in(self)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        deltas = list(self.deltas)
        if all(isinstance(d, LowRank) and not (d.training and d.dropout) for d in deltas):
            # one low-rank update of the concatenated factors, so that the sum is rounded once
            ups, downs = zip(*(d.factors() for d in deltas), strict=True)  # type: ignore[operator]
            up = torch.cat([gate * up for gate, up in zip(self.gates, ups, strict=True)], -1)
            return layer.low_rank(x, torch.cat(downs, -2), up, 0.0, onto)
        y = layer(x)
        known_layer = Given(layer, y.to(torch.promote_types(y.dtype, self.gates.dtype)), x)
        change = sum(
            gate * (delta(known_layer, x) - known_layer.y)
            for gate, delta in zip(self.gates, deltas, strict=True)
        )
        return add(known_layer.y + change, onto).to(y.dtype)

    def fold(self, w: Tensor, b: Tensor | None) -> WeightAndBias:
        folded = [delta.fold(w, b) for delta in self.deltas]  # type: ignore[operator]
        w_sum = w + sum(gate * (wi - w) for gate, (wi, _) in zip(self.gates, folded, strict=True))
        changes = [
            gate * (bi if b is None else bi - b)
            for gate, (_, bi) in zip(self.gates, folded, strict=True)
            if bi is not None
        ]
        return w_sum, add(sum(changes[1:], start=changes[0]), b) if changes else b


class PerExample(Opaque):
    """One delta, of any method, for each element of a batch.

    In eager mode, each delta computes only the elements that are assigned to it. In compiled code,
    each delta computes the whole batch, so that one graph serves any assignment.
    """

    def __init__(self, deltas: Sequence[Delta], slots: Slots) -> None:
        super().__init__()
        self.deltas, self.slots = nn.ModuleList(deltas), slots
        self.up_names = up_names_in(self)

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        y = out = layer(x)
        for i, delta in enumerate(self.deltas, start=1):
            is_own = self.slots.at == i
            if torch.compiler.is_compiling():
                out = torch.where(
                    is_own.view(-1, *(1,) * (y.dim() - 1)),
                    delta(Given(layer, y, x), x).to(y.dtype),
                    out,
                )
            elif len(rows := is_own.nonzero()[:, 0]):
                own = x[rows]
                out = out.index_copy(0, rows, delta(Given(layer, y[rows], own), own).to(y.dtype))
        return add(out, onto).to(y.dtype)


class Bank(Opaque):
    """`PerExample` for low-rank deltas without dropout: two batched matmuls for any assignment.

    It holds frozen copies of the factors, up (n + 1, out, r) and down (n + 1, r, in), padded to the
    largest rank r; slot 0 contains zeros.
    """

    def __init__(self, deltas: Sequence[LowRank], slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        ups, downs = zip(*(delta.factors() for delta in deltas), strict=True)
        rank = max(down.shape[0] for down in downs)
        padded_up = [F.pad(up.detach(), (0, rank - up.shape[1])) for up in ups]
        padded_down = [F.pad(down.detach(), (0, 0, 0, rank - down.shape[0])) for down in downs]
        self.register_buffer("up", torch.stack([torch.zeros_like(padded_up[0]), *padded_up]))
        self.register_buffer("down", torch.stack([torch.zeros_like(padded_down[0]), *padded_down]))

    def forward(self, layer: Layer, x: Tensor, onto: Tensor | None = None) -> Tensor:
        up, down = (t[self.slots.at] for t in (self.up, self.down))  # type: ignore[index]
        return layer(x, onto=add(torch.vmap(partial(layer.branch, p=0.0))(x, down, up), onto))


@dataclass(eq=False)
class Given(Upon):
    """A layer with a known output y for the input x, so that a combinator runs the layer below only
    once. Any other input, which a delta may have changed, runs the layer again.
    """

    under: Layer
    y: Tensor
    x: Tensor

    dense = of_under("dense")
    original = of_under("original")
    sources = of_under("sources")

    def __call__(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        if x is self.x:
            return add(self.y, onto)
        y = self.under(x, onto=onto)
        return y.to(torch.promote_types(y.dtype, self.y.dtype))
