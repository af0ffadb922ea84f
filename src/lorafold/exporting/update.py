"""What adapters add to the matrices of their base, as one pair of factors a site.

    dW = up @ down     up (*matrices, out, r) with every scale in it, down (*matrices, r, in)

Every method whose change is a product has its factors exactly: LoRA and its starts, VeRA, AdaLoRA,
a stack of them, their ranks added. Of the others (DoRA, LoHa, LoKr, IA3, whole matrices) the update
is computed and cut to the best of a rank (Eckart and Young 1936), which is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorafold.bases import layer_of
from lorafold.core.attach import adapted_modules
from lorafold.core.delta import Delta, on_meta
from lorafold.core.layer import Base
from lorafold.errors import NotMergeable
from lorafold.fold.plan import deltas_of
from lorafold.inspecting.updates import Svd, matrix_names, of_dense, of_factors, stacked, unstacked
from lorafold.methods.parts.token_rows import TokenRows

Factors = tuple[Tensor, Tensor]  # up, down
GATE_UP, DOWN = "gate_up_proj", "down_proj"
INTERLEAVED = frozenset({"gpt_oss"})  # families in whose rows gates and ups take turns


@dataclass(frozen=True)
class Update:
    """What the adapters of a model change.

    Attributes:
        factors: of each matrix that changes, by module path.
        dense: the methods by the module path of each update that is no product of factors, of which
            `factors` has none.
        beside: what else changes, by module path: biases, vectors, new tokens, virtual tokens.
        lost: squared norms, of what cutting lost and of the whole update, by the name of each
            matrix that was cut; experts one by one.
    """

    factors: Mapping[str, Factors]
    dense: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    lost: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a site."""
        return max((down.shape[-2] for _, down in self.factors.values()), default=0)

    @property
    def error(self) -> float:
        """The norm of what was lost relative to that of the updates that were cut."""
        lost, whole = (sum(column) for column in zip(*self.lost.values(), strict=True))
        return math.sqrt(lost / whole) if whole else 0.0


@torch.no_grad()
def update_of(model: nn.Module, names: Sequence[str], rank: int | None = None) -> Update:
    """What the named adapters change, lowest first; the model stays as it is.

    Args:
        model: with the adapters attached; its weights may be in files.
        names: of the adapters.
        rank: cut every update to this rank where it has a larger one; None cuts none.
    """
    factors: dict[str, Factors] = {}
    dense: dict[str, str] = {}
    beside: dict[str, str] = {}
    lost: dict[str, tuple[float, float]] = {}
    for path, module in adapted_modules(model):
        deltas = [*deltas_of(module, names)]
        if not deltas:
            continue
        layer = layer_of(module)
        if other := _beside(layer, deltas):
            beside[path] = other
            continue
        pair = _product(deltas)
        if pair is None and rank is None:
            parts = [p for delta in deltas for p in delta.parts() if p.factors() is None]
            dense[path] = ", ".join(sorted({type(part).__name__ for part in parts}))
        elif rank is None:
            factors[path] = pair  # type: ignore[assignment]
        else:
            svds = _of_product(*pair) if pair else _of_change(layer, deltas)
            factors[path] = _cut(matrix_names(path, layer.matrices), svds, rank, lost)
    return Update(factors, dense, beside, lost)


def _beside(layer: Base, deltas: Sequence[Delta]) -> str:
    """What the deltas change that is no matrix of the layer's shape, or nothing."""
    try:
        w, b = layer.dense_like()
        changed, bias = w, b
        for delta in deltas:
            changed, bias = on_meta(delta).fold(changed, bias)
    except NotMergeable as e:
        return str(e)
    if changed.shape != w.shape:
        return f"{changed.shape[0] - w.shape[0]:,} new rows"
    parts = [part for delta in deltas for part in delta.parts()]
    if rows := {i for part in parts if isinstance(part, TokenRows) for i in part.ids}:
        return f"{len(rows):,} rows of tokens"
    if bias is not b:
        return "a bias"
    return "" if w.dim() > 1 else "a vector"


def _product(deltas: Sequence[Delta]) -> Factors | None:
    """The factors of all deltas together, or None if one has none."""
    found = [delta.factors() for delta in deltas]
    if any(pair is None for pair in found):
        return None
    ups, downs = zip(*found, strict=True)
    return torch.cat(ups, -1).float(), torch.cat(downs, -2).float()


def _of_product(up: Tensor, down: Tensor) -> Iterator[Svd]:
    return map(of_factors, unstacked(up), unstacked(down))


def _of_change(layer: Base, deltas: Sequence[Delta]) -> Iterator[Svd]:
    """The SVD of what the deltas add to each matrix of the layer."""
    w, b = layer.dense()
    own = changed = w.float()
    for delta in deltas:
        changed, b = delta.fold(changed, b)
    return map(of_dense, unstacked(changed - own))


def _cut(
    names: Sequence[str], svds: Iterable[Svd], rank: int, lost: dict[str, tuple[float, float]]
) -> Factors:
    """The best factors of a rank, of each matrix; what that lost goes to `lost`."""
    found = []
    for name, svd in zip(names, svds, strict=True):
        kept, squares = svd.top(rank), svd.s.double().square()
        lost[name] = float(squares[rank:].sum()), float(squares.sum())
        root = kept.s.sqrt()
        found.append((kept.u * root, root[:, None] * kept.v.t()))
    return stacked(found) if len(names) > 1 or names[0].endswith("]") else found[0]


def apart(kind: str, name: str, factors: Factors) -> Iterator[tuple[str, Factors]]:
    """Yield the name and the factors of each matrix that a parameter of experts is.

    Args:
        kind: the model's type.
        name: of the parameter.
        factors: of all experts.
    """
    up, down = factors
    if name != GATE_UP:
        yield name, factors
        return
    if kind in INTERLEAVED:
        gate, beside = up[:, ::2], up[:, 1::2]
    else:
        gate, beside = up.chunk(2, 1)
    yield "gate_proj", (gate, down)
    yield "up_proj", (beside, down.clone())  # safetensors writes no tensor twice
